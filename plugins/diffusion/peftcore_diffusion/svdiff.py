"""SVDiff: the singular values of every weight are shifted.   Han et al. 2023, arXiv 2303.11305.

Equation:
    W = U S V',   W' = U diag(relu(S + scale * delta)) V' = W + U diag(max(scale * delta, -S)) V'
    w' = w + scale * delta   for a vector, the gain of a norm

Kernels of convolutions are decomposed as [out, in * kernel], tables without reshaping, and each expert separately. U, S
and V' are computed from the base weights when the method is applied, without the changes of other adapters. If you want
to change the weights, do it before; unmerge other adapters first. U, S and V' are computed again when an adapter is
loaded, so its file contains only the shifts.

All weights of the model except biases are adapted. By default each entry of a vector has a shift. With
``vectors="one"`` a vector counts as a matrix of one row, which has one singular value. ``injection.optimizer(...)``
trains the shifts of vectors with the learning rate `vector_lr`.

Parameters: min(out, in * kernel) for a matrix, times the number of experts. A vector of n entries has n, or 1 with
``vectors="one"``.

Start: delta at zero: the identity, to the bit.

Differs from the authors' code: This code uses the right-hand form of the equation, so a fresh injection equals the base
bit for bit; the authors' product of U, S and V' equals it up to rounding. Their code (phymhan/SVDiff) has a shift for
each entry of a vector; ``vectors="one"`` follows mkshing/svdiff-pytorch, an unofficial implementation. The authors
published no training code; `scale` and `vector_lr` follow the unofficial one.

Use it: `peftcore.apply(model, "svdiff")`, for subjects and styles from few images: a file is hundreds of times smaller
than the model. Shifts of several subjects add up: apply one adapter after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    Layer,
    LearningRate,
    Method,
    MethodConfig,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
)
from peftcore_diffusion._ties import alike, foremost, stored_as


class SVDiffConfig(MethodConfig):
    """Options of SVDiff."""

    method: Literal["svdiff"] = "svdiff"
    scale: PositiveFloat = 1.0
    """The factor on the shifts. Train with 1; when you load the adapter, smaller or larger values make its effect
    weaker or stronger."""
    vectors: Literal["entries", "one"] = "entries"
    """Train one shift for each entry of a vector, or one shift that scales the whole vector."""
    vector_lr: PositiveFloat = 1e-6
    """Learning rate of the shifts of vectors. Matrices use the learning rate of the optimizer, usually 1e-3."""


class SVDiffOperator(WeightOperator):
    """Shifts the singular values of one tensor; its singular vectors are frozen."""

    U: Tensor
    S: Tensor
    V: Tensor

    def __init__(self, site: Site, config: SVDiffConfig) -> None:
        super().__init__(site)
        self.scale = config.scale
        U, S, V = self._decompose(site.base_weight())
        for name, tensor in (("U", U), ("S", S), ("V", V)):
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.delta = nn.Parameter(torch.zeros(S.shape))  # [*batch, min(out, in * kernel)]

    def take_base(self, weight: Tensor) -> None:
        for buffer, found in zip((self.U, self.S, self.V), self._decompose(weight), strict=True):
            buffer.copy_(found)

    def _decompose(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lead = self.layer.batch_dims
        matrix = weight.detach().flatten(lead + 1) if weight.dim() > lead + 1 else weight.detach().unsqueeze(lead)
        U, S, V = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
        return U, S, V

    def forward(self, weight: Tensor) -> Tensor:
        shift = self.scale * self.delta
        shift = torch.where(self.S + shift <= 0, -self.S, shift)  # relu(S + shift) - S, with the gradient of relu
        return weight + ((self.U * shift.unsqueeze(-2)) @ self.V).view(weight.shape)


class VectorOperator(WeightOperator):
    """Shifts each entry of a vector."""

    def __init__(self, site: Site, config: SVDiffConfig) -> None:
        super().__init__(site)
        self.scale = config.scale
        self.delta = nn.Parameter(torch.zeros(site.weight_shape))  # [*batch, n]

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.delta


class SVDiff(Method):
    """Shifts of singular values."""

    name = "svdiff"
    Config = SVDiffConfig
    config_version = 2
    former_defaults = ({"vectors": "one"},)
    tags = Tags(category="diffusion", paper="2303.11305", mergeable=True)
    learning_rate = LearningRate(1e-3, "mkshing/svdiff-pytorch@a78f69e, README.md", on="Stable Diffusion 1.5")
    target = "*"

    def inject(self, model: nn.Module, config: SVDiffConfig, surgeon: Surgeon) -> None:
        for group in alike(weight for site in surgeon.sites() for weight in _weights(site)):
            site, rest = foremost(group), [each for each in group if each is not foremost(group)]
            if rest:  # one shift for all, in the layout of storage
                site, *rest = (stored_as(each, Layer()) for each in (site, *rest))
            operator = VectorOperator if _entries(site, config.at(site.path)) else SVDiffOperator
            surgeon.graft(site, operator, config, tuple(rest))

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        groups: dict[float, list[nn.Parameter]] = {}
        for graft in injection.grafts:
            if graft.by_method and graft.operator.get_parameter("delta").requires_grad:
                rate = injection.config.at(graft.site.path).vector_lr if _is_vector(graft.site) else lr
                groups.setdefault(rate, []).append(graft.operator.get_parameter("delta"))
        return [{"params": shifts, **defaults, "lr": rate} for rate, shifts in groups.items()]

    @staticmethod
    def parameter_count(site: Site, config: SVDiffConfig) -> int:
        shape = site.weight_shape[site.layer.batch_dims :]
        return math.prod(site.batch) * (shape[0] if _entries(site, config) else min(shape[0], math.prod(shape[1:])))


def _is_vector(site: Site) -> bool:
    return len(site.weight_shape) == site.layer.batch_dims + 1


def _entries(site: Site, config: SVDiffConfig) -> bool:
    """Return True if the site has a shift for each of its entries."""
    return _is_vector(site) and config.vectors == "entries"


def _weights(site: Site) -> Iterator[Site]:
    """Yield the site if its module has a weight. Otherwise yield a site for each parameter of the module itself, except
    biases and scalars."""
    if site.layer.has(site.module, site.tensor):
        yield site
        return
    for tensor in site.tensors():
        if not tensor.endswith("bias") and not site.missing(tensor) and site.module.get_parameter(tensor).dim():
            yield site.at(tensor)
