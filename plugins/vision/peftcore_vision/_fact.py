"""Base operator of FacT-TT and FacT-TK, two methods of factor tuning. The weights of a model are cut into square
slices. The update of each slice is a product of three factors. All slices share the two outer factors; the middle
factor belongs to the site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MethodConfig, Operator, Share, Shared, Site, Surgeon
from peftcore.errors import UnsupportedSite
from peftcore_vision._dropped import own_dropout


class FactConfig(MethodConfig):
    """Options of factor tuning."""

    overridable = ("scale", "dropout")

    rank: PositiveInt = 16
    """Rank r of the decomposition."""
    scale: PositiveFloat = 1.0
    """The factor s in front of the update; the authors search it between 0.01 and 100."""
    dropout: Share | None = None
    """Dropout probability of the inputs of V. None: 0.1, as in the authors' code, but 0 for weights that the model
    reads without calling their module, since dropout cannot act there."""


@dataclass(frozen=True, eq=False)
class FactSite(Site):
    """A weight that is cut into slices of ``[d, d]``."""

    side: int = 1
    """The side d of a slice."""
    total: int = 0
    """Number of slices of all sites together."""

    @property
    def cut(self) -> tuple[int, int, int]:
        """Return three counts: slices along the outputs, slices along the inputs, and positions of the convolution
        kernel."""
        return self.out_features // self.side, self.in_features // self.side, math.prod(self.kernel)

    @property
    def count(self) -> int:
        """Count the slices of the site."""
        return math.prod(self.batch) * math.prod(self.cut)


def _common(sites: Iterable[Site]) -> int:
    """Return the largest number that divides all widths."""
    return math.gcd(*(width for site in sites for width in (site.out_features, site.in_features)))


def fact_sites(surgeon: Surgeon, config: FactConfig) -> list[FactSite]:
    """Return the target sites, with the side d of their square slices. d is the greatest common divisor of the widths
    of all targets. In image transformers it is the hidden size.

    Raises:
        UnsupportedSite: the widths' greatest common divisor is smaller than the rank.
    """
    sites = [site for site in surgeon.sites() if site.role != "router"]  # some have the path of a gate
    side = _common(sites)
    if side < config.rank:
        modules = dict.fromkeys(site.module_path for site in sites)
        odd = max(modules, key=lambda path: _common(site for site in sites if site.module_path != path))
        raise UnsupportedSite(
            f"{config.method} cuts weights into squares, but the widths of the targets have only the divisor {side} in "
            f"common, less than rank={config.rank}; lower the rank or exclude targets of other widths, such as {odd}"
        )
    cut = [FactSite(**vars(site), side=side) for site in sites]
    return [replace(site, total=sum(each.count for each in cut)) for site in cut]


def shared_factors(surgeon: Surgeon, side: int, rank: int) -> tuple[Shared, Shared]:
    """Return the shared factors U [r, d], initialized as `nn.Linear` does, and V [d, r], initialized to zero."""

    def zero() -> nn.Module:
        linear = nn.Linear(rank, side, bias=False)
        nn.init.zeros_(linear.weight)
        return linear

    return surgeon.own("U", lambda: nn.Linear(side, rank, bias=False)), surgeon.own("V", zero)


class FactOperator(Operator):
    """The update B A of one site. A is the middle factor times U, for all slices. B repeats V for each row of
    slices."""

    stackable = True

    def __init__(self, site: FactSite, config: FactConfig, U: Shared, V: Shared) -> None:
        super().__init__(site)
        if config.dropout and site.form == "weight":
            raise UnsupportedSite(
                f"{site.path} is read, not called, so dropout cannot reach its update; use dropout=0 or exclude it"
            )
        self.U, self.V, self.rank, self.scale = U, V, config.rank, config.scale
        self.batch, self.cut, self.kernel = site.batch, site.cut, site.kernel
        self.dropout = nn.Dropout(own_dropout(site, config.dropout))

    def middle(self) -> Tensor:
        """Return the middle factor Sigma ``[*batch, kernel, outputs * r, inputs * r]`` of a weight that is cut into
        `outputs` times `inputs` slices. Each slice has one block [r, r], at its position in the weight."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor, float]:
        U, V = self.U.module.weight, self.V.module.weight
        rows, columns, _ = self.cut
        middle = self.middle().unflatten(-1, (columns, self.rank))
        A = torch.einsum("...koiq,qd->...oidk", middle, U).flatten(-3, -2)  # [*batch, rows * r, in, kernel]
        B = V if rows == 1 else torch.kron(torch.eye(rows, dtype=V.dtype, device=V.device), V)
        return A.reshape(*A.shape[:-1], *self.kernel), B.expand(*self.batch, *B.shape), self.scale

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, *self.factors()[:2])
        return self.layer.add(y, self.dropout(self.layer.apply(x, A)), B, self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        A, B, scale = self.factors()
        return weight + scale * (B @ A.flatten(B.dim() - 1)).view(weight.shape)
