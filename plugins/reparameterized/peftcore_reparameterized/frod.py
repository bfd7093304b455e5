"""FRoD: full-rank fine-tuning with rotational degrees.   AAAI 2026, doi 10.1609/aaai.v40i31.39813 (in peft).

    W_i = U_i diag(L0_i) V',     V [in, in] one for all sites of a role, columns of U_i of length one
    W_i' = W_i + U_i (S_i + diag(L_i - L0_i)) V',    L_i [in] = L0_i,    S_i zero but for n entries off the diagonal

V is computed from all weights of the role. With W = Q R, W all of them stacked vertically, R' V^-1' and Q_i those rows
of Q: V = R' E, E the eigenvectors of the mean of (Q_i' Q_i + ridge)^-1; where W has fewer rows than columns, its right
singular vectors. U and L0 follow from V and the weight. n = sparsity * in^2, at positions that are drawn once a role.
Sites whose paths end alike have one role, as in peft; also as in peft, of two sites with the same number only the later
one counts, so T5's decoder sets V for its encoder too. In directions that are zero in all weights, U has the scaled
rounding errors of V.

Files hold V, U and L0, so they are larger than the weights: eigenvectors computed again, on another machine, would
differ, by signs at least. peft's files hold V without U, and peft computes U from a newly computed V instead of the
file's V: on a machine where V differs, its adapters give different outputs. Here U is computed from the file's V.

Kernels of convolutions count as columns, in * kernel; experts are weights like any other; V of an embedding is
[num, num], so of a small one alone. peft supports linear layers only.

Parameters: in * kernel + n a site, times the number of experts.

Use it where the update shall have a full rank and few parameters, and memory for V and U is available.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Operator, Share, Shared, Site, Surgeon, Tags
from peftcore.errors import ConfigError
from peftcore_reparameterized._basis import columns
from peftcore_reparameterized._decomposed import as_matrix
from peftcore_reparameterized._joint import Joint, by_role, within
from peftcore_reparameterized._low_rank import input_dropout


class FRoDConfig(MethodConfig):
    """Options of FRoD."""

    method: Literal["frod"] = "frod"
    sparsity: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """The share of entries of S that train; one at least, unless it is 0."""
    ridge: PositiveFloat = 1e-3
    """The number that is added to the diagonals before an inverse is taken, where V is found."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    projection_seed: NonNegativeInt = 0
    """Seed of the positions in S."""


def entries(inputs: int, config: FRoDConfig) -> int:
    """Return n: how many entries off the diagonal train."""
    most = inputs * (inputs - 1)
    return min(max(int(inputs * inputs * config.sparsity), int(config.sparsity > 0)), most)


class FRoDOperator(Operator):
    """The trained values of one site, between its own U and the V of its role."""

    U: Tensor
    L0: Tensor

    def __init__(self, site: Site, config: FRoDConfig, joint: Shared) -> None:
        super().__init__(site)
        self.joint, self.input_dropout = joint, input_dropout(site, config.dropout)
        self.inputs = (site.in_features, *site.kernel)
        U, L = within(joint.module.V, as_matrix(site))
        self.register_buffer("U", U.contiguous())
        self.register_buffer("L0", L)
        self.L = nn.Parameter(L.clone())
        self.S = nn.Parameter(torch.zeros(*site.batch, len(joint.module.index)))

    def core(self) -> Tensor:
        """Return ``S + diag(L - L0)``, [*batch, in, in]: zero at first, to the bit."""
        core = torch.diag_embed(self.L - self.L0)
        return core.flatten(-2).index_add(-1, self.joint.module.index, self.S).view(core.shape)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        V, U = self.cast(y, self.joint.module.V, self.U)
        low = self.layer.apply_dropped(x, V.mT.unflatten(-1, self.inputs), self.input_dropout if self.training else 0.0)

        def turned(low: Tensor, *trained: Tensor) -> Tensor:
            return self.layer.mix(low, self.core().to(low.dtype))

        # computed again in backward, which keeps no matrix of V's size
        low = checkpoint(turned, low, self.L, self.S, use_reentrant=False)
        return self.layer.add(y, low, U, 1.0)

    def merged(self, weight: Tensor) -> Tensor:
        V = self.joint.module.V.to(self.U)
        return weight + (self.U @ (self.core() @ V.mT)).view(weight.shape)


class FRoD(Method):
    """Full-rank fine-tuning with rotational degrees."""

    name = "frod"
    Config = FRoDConfig
    tags = Tags(category="reparameterized", paper="AAAI 2026, doi 10.1609/aaai.v40i31.39813", mergeable=True)
    learning_rate = LearningRate(
        2e-2, "huggingface/peft@5d602fd, examples/frod_finetuning/frod_text_classification.py", on="BERT-base, SST-2"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: FRoDConfig, surgeon: Surgeon) -> None:
        if any(changes.keys() - {"dropout"} for changes in config.overrides.values()):
            raise ConfigError("frod: sites of a role share V, so overrides can change dropout alone")
        for name, sites, counted in by_role(surgeon.sites()):
            count = entries(columns(sites[0]), config)
            basis = surgeon.own(name, partial(Joint, counted, count, config.ridge, config.projection_seed))
            for site in sites:
                surgeon.graft(site, FRoDOperator, config, joint=basis)

    @staticmethod
    def parameter_count(site: Site, config: FRoDConfig) -> int:
        return math.prod(site.batch) * (columns(site) + entries(columns(site), config))
