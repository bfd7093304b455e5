"""RepAdapter.   Luo et al. 2023, arXiv 2302.08106 (code: luogen1996/RepAdapter).

    y = W x' + bias,   x' = x + s (G(A x + a) + b),   A [h, d],   G [d, h] of g diagonal blocks [d/g, h/g]
    W' = W (I + s G A),   bias' = bias + W s (G a + b)        since nothing in it is non-linear

in front of the matrices that a branch reads with: queries, keys and values, which share one adapter, as the gate of a
feed-forward shares its with the matrix beside it. A starts from a Xavier-uniform draw, all else at zero: an exact
identity. The authors' own merging fails with g = 1. A convolution has its adapter on channels, as their RepAdapter2D;
one that pads is refused, since the shift b would not reach its padding, and a weight that is read without a bias.

Parameters: d h + h + d h / g + d an adapter. Use it where inference must cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags, bias_name
from peftcore.errors import UnsupportedSite
from peftcore_vision._dropped import own_dropout

READERS = {
    "attn": ("attn.q", "attn.k", "attn.v", "attn.kv", "attn.qkv"),
    "cross.kv": ("cross.k", "cross.v", "cross.kv"),
    "mlp": ("mlp.gate", "mlp.up", "mlp.gate_up"),
}
"""Roles of matrices that read the same, where they stand in one module."""


class Config(MethodConfig):
    """Options of RepAdapter."""

    method: Literal["repadapter"] = "repadapter"
    bottleneck: PositiveInt = 8
    """Width h of the bottleneck."""
    groups: PositiveInt = 2
    """Into how many blocks G falls: g, a divisor of h and of d."""
    scale: PositiveFloat = 1.0
    """The factor s in front of the adapter; the authors search it between 0.1 and 10."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Probability with which the bottleneck's numbers drop in training; None: 0.1, but 0 where weights are read."""


class RepAdapterOperator(Operator):
    """The adapter in front of one matrix, or of several that read the same."""

    stackable = True

    changes_inputs = True

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        width, inner, self.groups = site.in_features, config.bottleneck, config.groups
        if width % self.groups or inner % self.groups:
            raise UnsupportedSite(f"{site.path}: groups={self.groups} does not divide {width} inputs and h = {inner}")
        self.scale, self.dropout = config.scale, nn.Dropout(own_dropout(site, config.dropout))
        self.A = nn.Parameter(torch.empty(*site.batch, inner, width))
        self.a = nn.Parameter(torch.zeros(*site.batch, inner))
        self.B = nn.Parameter(torch.zeros(*site.batch, width, inner // self.groups))  # the blocks, one below the other
        self.b = nn.Parameter(torch.zeros(*site.batch, width))
        nn.init.uniform_(self.A, -math.sqrt(6 / (width + inner)), math.sqrt(6 / (width + inner)))

    def _up(self, low: Tensor, B: Tensor) -> Tensor:
        """Compute G of the numbers [..., h]."""
        blocks = B.unflatten(-2, (self.groups, -1))  # [*batch, g, d/g, h/g]
        return torch.einsum("...gi,...goi->...go", low.unflatten(-1, (self.groups, -1)), blocks).flatten(-2)

    def forward(self, call: Callable[..., Any], x: Tensor) -> Any:
        A, a, B, b = self.cast(x, self.A, self.a, self.B, self.b)
        dim = self.layer.channel_dim
        low = self.dropout(F.linear(x.movedim(dim, -1), A, a))
        return call(x + self.scale * (self._up(low, B) + b).movedim(-1, dim).to(x.dtype))

    def _through(self, weight: Tensor, columns: Tensor) -> Tensor:
        """Compute ``s W columns``, of columns ``[*batch, n, d]``: [*batch, out, n, kernel]."""
        dtype = torch.promote_types(weight.dtype, columns.dtype)
        matrices = weight.to(dtype).reshape(*weight.shape[: self.A.dim()], -1)  # [*batch, out, d, kernel]
        return self.scale * torch.einsum("...odk,...nd->...onk", matrices, columns.to(dtype))

    def merged(self, weight: Tensor) -> Tensor:
        columns = self._up(self.A.mT, self.B.unsqueeze(-3))  # [*batch, d, d], a row for each input
        return weight + self._through(weight, columns).reshape(weight.shape)

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        shift = self._through(weight(), (self._up(self.a, self.B) + self.b).unsqueeze(-2)).sum((-2, -1))
        return shift if bias is None else bias + shift


def _refuse(site: Site, config: Config) -> None:
    """Raise where the adapter cannot act, or not so that merging it is exact."""
    layer, padding = site.layer, getattr(site.layer, "padding", None)
    spread = math.prod(site.kernel) > 1
    if layer.one_hot or getattr(site.module, "groups", 1) > 1 or (spread and padding is None):
        raise UnsupportedSite(f"{site.path}: no adapter on channels goes in front of it")
    if spread and padding != "valid" and any(each != 0 for each in padding):
        raise UnsupportedSite(f"{site.path} pads with numbers that the adapter would not reach; exclude= it")
    if site.form == "weight" and config.dropout:
        raise UnsupportedSite(f"{site.path} is read, so dropout cannot reach its input; use dropout=0 or exclude it")
    if site.form == "weight" and site.missing(bias_name(site.tensor)):
        raise UnsupportedSite(f"{site.path} is read and has no bias beside it that could take the adapter's shift")


def _read_alike(surgeon: Surgeon) -> Iterable[list[Site]]:
    """Group the targets that read the same input."""
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
    """Return parts that are all of a fused matrix as that matrix; else as weights, for other slices would read what
    goes through."""
    first = parts[0]
    if first.slices is None:
        return parts
    if sum(part.out_features for part in parts) == replace(first, slices=None).out_features:
        return [replace(surgeon.resolver.site(first.module_path, first.tensor), meta=first.meta)]
    return [replace(part, form="weight") for part in parts]


class RepAdapter(Method):
    """Linear adapters in front of attention and feed-forward, which merge into their first matrices."""

    name = "repadapter"
    Config = Config
    tags = Tags(category="vision", paper="2302.08106", mergeable=True, random=True)
    learning_rate = LearningRate(1e-3, "luogen1996/RepAdapter@360992f, train.py", on="ViT-B/16, VTAB-1k")
    config_version = 2
    former_defaults = ({"dropout": 0.0},)
    target = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for first, *others in _read_alike(surgeon):
            for site in (first, *others):
                _refuse(site, config.at(first.path))
            surgeon.graft(first, RepAdapterOperator, config, tuple(others))

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        width, inner = site.in_features, config.bottleneck
        return math.prod(site.batch) * (width * inner + inner + width * inner // config.groups + width)
