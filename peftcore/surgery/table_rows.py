"""Rows of a token table that the user added to the base model. They are saved with an adapter although they did not
train."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.contract.operators import Operator
from peftcore.layers.layer import Layer, bias_name
from peftcore.targets.sites import Site


class RowsSite(Site):
    """The rows of a token table as a site, separate from other sites at the table. The tensor has the layout in which
    it is stored, ``[tokens, width]``."""

    def _make_path(self) -> str:
        return f"{super()._make_path()}:rows"

    @classmethod
    def of(cls, site: Site) -> RowsSite:
        """Returns the site for the rows of a table, given the table's site."""
        return cls(**{**vars(site), "layer": site.layer.as_stored})


class TableRows(Operator):
    """The last rows of a token table, frozen. They replace the same rows of the host's table in lookups and
    products."""

    value: Tensor
    bias: Tensor | None

    def __init__(self, site: RowsSite, table: Layer, start: int) -> None:
        super().__init__(site)
        self.looks_up, self.start = table.one_hot, start
        bias = site.at(bias_name(site.tensor))
        self.register_buffer("value", site.weight().detach()[start:].clone())
        self.register_buffer("bias", None if bias.missing(bias.tensor) else bias.weight().detach()[start:].clone())

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)  # [..., width] of a table, [..., tokens] of a head
        (value,) = self.cast(y, self.value)
        if self.looks_up:
            place = x - self.start
            return torch.where((place >= 0)[..., None], F.embedding(place.clamp(min=0), value), y)
        bias = None if self.bias is None else self.bias.to(y.dtype)
        return torch.cat([y[..., : self.start], F.linear(x, value, bias)], -1)

    def merged(self, weight: Tensor) -> Tensor:  # [tokens, width]
        return torch.cat([weight[: self.start], self.value.to(weight.dtype)])

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:  # [tokens]
        if bias is None or self.bias is None:
            return bias
        return torch.cat([bias[: self.start], self.bias.to(bias.dtype)])
