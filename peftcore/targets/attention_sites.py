"""Attention modules that can be edited, with their sizes and projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.layers.layer import Layer, Slices, bias_name, take
from peftcore.targets.sites import Site


@dataclass(frozen=True)
class Geometry:
    """The sizes of one attention."""

    heads: int
    kv_heads: int
    """Heads of keys and values: fewer than `heads` in grouped-query attention."""
    head_dim: int
    """Width of a query and of a key."""
    value_dim: int
    """Width of a value."""


@dataclass(frozen=True)
class Projection:
    """A matrix, or slices of a matrix, from which an attention computes queries, keys or values."""

    module: str
    """Path, below the attention, of the module that holds the matrix; "" for the attention itself."""
    tensor: str
    layer: Layer
    slices: Slices | None
    in_features: int
    out_features: int

    def apply(self, attention: nn.Module, states: Tensor, base: bool = False) -> Tensor:
        """Returns the projection of `states` ``[..., in]``, including the bias and the injections that are active now.
        If `base` is True, injections are left out. This is used for batches whose rows have different injections."""
        module = attention.get_submodule(self.module)
        if self.layer.called and not base:
            return take(module(states), self.slices, -1)
        stored = self.layer.read(module, self.tensor)
        assert stored is not None, "a projection has a matrix"
        weight = take(self.layer.logical(stored), self.slices, 0)
        bias = self.layer.read(module, bias_name(self.tensor))
        bias = None if bias is None else take(bias, self.slices, 0)
        return F.linear(states.to(weight.dtype), weight, bias)


@dataclass(frozen=True, eq=False)
class AttentionSite(Site):
    """An attention module whose queries, keys and values can be edited."""

    geometry: Geometry = field(kw_only=True)
    """The numbers of heads and of key and value heads, and their widths."""
    projections: Mapping[str, Projection] = field(kw_only=True)
    """The existing matrices of the attention by part: "q", "k", "v"."""
    calls: Any = field(kw_only=True, default=None)
    """The way in which the module calls its attention function; None for a site that only provides sizes."""

    @property
    def weight_shape(self) -> torch.Size:
        """The sizes that plans and files store instead of a shape: ``[heads, kv_heads, head_dim, value_dim]``."""
        sizes = self.geometry
        return torch.Size([sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.value_dim])
