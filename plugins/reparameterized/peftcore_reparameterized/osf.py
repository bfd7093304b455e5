"""OSF: orthogonal subspace fine-tuning.   Nayak et al. 2025, arXiv 2504.07097
(Red-Hat-AI-Innovation-Team/orthogonal-subspace-learning).

Equation:
    W = U_h S_h V_h' + U_l S_l V_l'      of the k largest singular values, and of all others
    W' = W + U S V' - U_l S_l V_l',      U, S and V trained from U_l, S_l and V_l

The gradient of U is orthogonal to U_h, and that of V to V_h: the largest singular directions, which contain the main
knowledge of the model, are unchanged. So the gradients of U and V are not those of the loss. They do not depend on the
optimizer, as in peft, which projects them by hooks. The step of an optimizer that scales entries separately, such as
Adam, is not exactly orthogonal.

`effective_rank` is k: a number, or a share of the smaller side, rounded down. Kernels of convolutions are decomposed as
[out, in * kernel], embeddings as [dim, num], and each expert separately.

Files contain U, S and V and their initial values, because a decomposition on another machine would differ, at least by
rounding.

Parameters: (min(out, in) - k) (out + in + 1) a site, times the number of experts: with half of the singular values
nearly as many as in the weight, or more.

Start: U, S and V at U_l, S_l and V_l: the identity.

Differs from the authors' code: The authors' code was not compared; peft was. peft supports linear layers only. Files of
peft lack the initial values, which peft computes from the model again.

Use it: `peftcore.apply(model, "osf")`, to train one task after the other without losing previous knowledge.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_reparameterized._basis import columns
from peftcore_reparameterized._decomposed import as_matrix, principal
from peftcore_reparameterized._low_rank import LowRankOperator


class OSFConfig(MethodConfig):
    """Options of OSF."""

    method: Literal["osf"] = "osf"
    effective_rank: PositiveInt | Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Number, or share, of the largest singular values that are frozen."""


def frozen_rank(site: Site, config: OSFConfig) -> int:
    """Return k, the number of the largest singular values that are frozen.

    Raises:
        UnsupportedSite: either no singular value would be frozen, or all of them.
    """
    rank, k = min(site.out_features, columns(site)), config.effective_rank
    k = int(rank * k) if isinstance(k, float) else k
    if not 0 < k < rank:
        raise UnsupportedSite(
            f"{site.path} has {rank} singular values, of which effective_rank={config.effective_rank} keeps {k}: at "
            "least one must stay, and at least one must train; exclude it, or set another value for it with overrides="
        )
    return k


class OSFOperator(LowRankOperator):
    """The trained smaller singular values and vectors of one site, and the initial values of both."""

    U: Tensor
    S: Tensor
    V: Tensor
    U0: Tensor
    S0: Tensor
    V0: Tensor
    kept_U: Tensor
    kept_V: Tensor

    def __init__(self, site: Site, config: OSFConfig) -> None:
        super().__init__(site)
        self.site_inputs, k = (site.in_features, *site.kernel), frozen_rank(site, config)
        matrix = as_matrix(site)
        U, S, V = principal(matrix, min(matrix.shape[-2:]))
        for name, low in (("U", U[..., k:]), ("S", S[..., k:]), ("V", V[..., k:, :])):
            self.register_buffer(f"{name}0", low.contiguous().clone())
            self.register_parameter(name, nn.Parameter(low.contiguous().clone()))
        self.register_buffer("kept_U", U[..., :k].contiguous())
        self.register_buffer("kept_V", V[..., :k, :].contiguous())

    def projected(self) -> tuple[Tensor, Tensor]:
        """Return U and V. Their gradients are projected to be orthogonal to the frozen singular vectors."""
        U, V = self.U, self.V
        if torch.is_grad_enabled():
            free_U = U - self.kept_U @ (self.kept_U.mT @ U)
            free_V = V - (V @ self.kept_V.mT) @ self.kept_V
            return U.detach() + (free_U - free_U.detach()), V.detach() + (free_V - free_V.detach())
        return U, V

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the factors of ``U S (V - V0)' + (U S - U0 S0) V0'``. The update is exactly zero at first."""
        U, V = self.projected()
        left, left0 = U * self.S.unsqueeze(-2), self.U0 * self.S0.unsqueeze(-2)
        A = torch.cat([V - self.V0, self.V0], -2)  # [*batch, 2 low, in * kernel]
        return A.unflatten(-1, self.site_inputs), torch.cat([left, left - left0], -1), 1.0


class OSF(Method):
    """Training of a weight's smaller singular values, orthogonally to the larger ones."""

    name = "osf"
    Config = OSFConfig
    tags = Tags(category="reparameterized", paper="2504.07097", mergeable=True, low_rank=True, exact_gradient=False)
    learning_rate = LearningRate(
        1e-5,
        "Red-Hat-AI-Innovation-Team/orthogonal-subspace-learning@0fb803f, notebooks/llama-single-gpu-code/test2.py",
        on="LLaMA 7B, text classification",
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: OSFConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, OSFOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: OSFConfig) -> int:
        inputs = columns(site)
        low = min(site.out_features, inputs) - frozen_rank(site, config)
        return math.prod(site.batch) * low * (site.out_features + inputs + 1)
