"""Linear adapters in front of the first matrices of a branch (attention or feed-forward). Matrices with the same input
share one adapter, and an adapter can be merged into the matrix that reads its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.author import Operator, Site, Surgeon, bias_name
from peftcore.errors import UnsupportedSite
from peftcore_vision._dropped import own_dropout

READERS = {
    "attn": ("attn.q", "attn.k", "attn.v", "attn.kv", "attn.qkv"),
    "cross.kv": ("cross.k", "cross.v", "cross.kv"),
    "mlp": ("mlp.gate", "mlp.up", "mlp.gate_up"),
}
"""Roles of matrices that have the same input if one module contains them."""


class InFrontOperator(Operator):
    """A low-rank map in front of one matrix, or of several with the same input: ``x' = x + s (up(A x + a) + b)``."""

    stackable = True

    changes_inputs = True

    def __init__(self, site: Site, dropout: float | None, scale: float) -> None:
        super().__init__(site)
        self.scale, self.dropout = scale, nn.Dropout(own_dropout(site, dropout))

    def down(self) -> tuple[Tensor, Tensor | None]:
        """Return A ``[*batch, h, d]`` and its bias a ``[*batch, h]``. The bias is None if A lacks a bias."""
        raise NotImplementedError

    def up(self, low: Tensor) -> Tensor:
        """Map ``[..., h]``, the bottleneck's activations, to features ``[..., d]`` of the same dtype."""
        raise NotImplementedError

    def shift(self) -> Tensor:
        """Return the output bias b ``[*batch, d]``."""
        raise NotImplementedError

    def forward(self, call: Callable[..., Any], x: Tensor) -> Any:
        A, a = self.down()
        A, b = self.cast(x, A, self.shift())
        low = self.dropout(F.linear(self.layer.channels_last(x), A, None if a is None else a.to(x.dtype)))
        return call(x + self.scale * self.layer.channels_back(self.up(low) + b).to(x.dtype))

    def _through(self, weight: Tensor, columns: Tensor) -> Tensor:
        """Return the product s W c ``[*batch, out, n, kernel]`` for `columns` c ``[*batch, n, d]``."""
        dtype = torch.promote_types(weight.dtype, columns.dtype)
        matrices = weight.to(dtype).reshape(*weight.shape[: self.layer.batch_dims + 2], -1)  # [*batch, out, d, kernel]
        return self.scale * torch.einsum("...odk,...nd->...onk", matrices, columns.to(dtype))

    def merged(self, weight: Tensor) -> Tensor:
        columns = self.up(self.down()[0].mT)  # [*batch, d, d], a row for each input
        return weight + self._through(weight, columns).reshape(weight.shape)

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        a, b = self.down()[1], self.shift()
        moved = b if a is None else self.up(a.unsqueeze(-2)).squeeze(-2) + b
        shift = self._through(weight(), moved.unsqueeze(-2)).sum((-2, -1))
        return shift if bias is None else bias + shift


def refuse(site: Site, dropout: float | None) -> None:
    """Raise UnsupportedSite for a site where the adapter cannot act or cannot be merged exactly."""
    layer = site.layer
    padding: Any = getattr(layer, "padding", None)
    spread = math.prod(site.kernel) > 1
    if layer.one_hot or getattr(site.module, "groups", 1) > 1 or (spread and padding is None):
        raise UnsupportedSite(
            f"{site.path}: an adapter on the input channels cannot be merged into it (a table, or a grouped "
            "convolution); exclude it"
        )
    if spread and padding != "valid" and any(each != 0 for each in padding):
        raise UnsupportedSite(
            f"{site.path} pads its input, and an adapter in front of it would not act on the padding; exclude it"
        )
    if site.form == "weight" and dropout:
        raise UnsupportedSite(
            f"{site.path} is read as a weight, not called, so dropout cannot act on its input; use dropout=0 or "
            "exclude it"
        )
    if site.form == "weight" and site.missing(bias_name(site.tensor)):
        raise UnsupportedSite(
            f"{site.path} is read as a weight and has no bias to which the adapter's shift could be added; exclude it"
        )


def read_alike(surgeon: Surgeon) -> Iterable[list[Site]]:
    """Yield groups of targets that read the same input."""
    together: dict[Any, dict[Any, list[Site]]] = {}
    for site in surgeon.sites():
        owner = site.module_path.rpartition(".")[0] if site.tensor == "weight" else site.module_path
        family = next((name for name, roles in READERS.items() if site.role in roles), site.path)
        if site.role != "router":  # some have the path of a gate
            matrices = together.setdefault((owner, family, site.in_features, site.layer), {})
            matrices.setdefault((site.module_path, site.tensor), []).append(site)
    for matrices in together.values():
        yield [site for parts in matrices.values() for site in _joined(surgeon, parts)]


def _joined(surgeon: Surgeon, parts: list[Site]) -> list[Site]:
    """Return the site of the whole fused matrix if the parts cover it. Otherwise return each part with the form
    "weight", since an adapter on the input would also change the outputs of other parts."""
    first = parts[0]
    if first.slices is None:
        return parts
    if sum(part.out_features for part in parts) == replace(first, slices=None).out_features:
        return [replace(surgeon.resolver.site(first.module_path, first.tensor), meta=first.meta)]
    return [replace(part, form="weight") for part in parts]
