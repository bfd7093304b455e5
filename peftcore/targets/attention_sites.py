"""Attention modules that can be edited, with their sizes and projections. They are found from the module's code,
attributes and host map, before the model is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftcore.errors import TargetError, UnsupportedSite
from peftcore.forward.attention.attention import Geometry, Projection
from peftcore.forward.attention.attention_calls import AttentionCalls, calls_of
from peftcore.roles.hostmap import under
from peftcore.targets.resolver import Resolver
from peftcore.targets.sites import Site

# Names of these sizes in attention classes; the first that a module has counts.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_VALUE_DIM = ("v_head_dim",)
_GROUPS = ("num_key_value_groups",)


@dataclass(frozen=True, eq=False)
class AttentionSite(Site):
    """An attention module whose queries, keys and values can be edited."""

    geometry: Geometry = field(kw_only=True)
    """The numbers of heads and of key and value heads, and their widths."""
    projections: Mapping[str, Projection] = field(kw_only=True)
    """The attention's own matrices by part: "q", "k", "v", as far as they exist."""
    calls: AttentionCalls | None = field(kw_only=True, default=None)
    """The way in which the module calls its attention function; None for a site that only provides sizes."""

    @property
    def weight_shape(self) -> torch.Size:
        """The sizes that plans and files store instead of a shape: ``[heads, kv_heads, head_dim, value_dim]``."""
        sizes = self.geometry
        return torch.Size([sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.value_dim])


def locate(site: Site, resolver: Resolver) -> AttentionSite:
    """Returns the attention at a site: its module, or the one inside it that computes attention (BERT's
    ``attention.self``).

    Raises:
        UnsupportedSite: the site contains no attention module or several, or the module does not use the attention
            interface.
    """
    known_calls = {path: calls_of(resolver.modules[path]) for path in _paths(site, resolver)}
    inside = {path: calls for path, calls in known_calls.items() if calls is not None}
    if len(inside) != 1:
        found = f"has several attentions inside, {', '.join(inside)}: target one" if inside else _REASON
        raise UnsupportedSite(f"{site.path or 'the host'} {found}")
    ((path, calls),) = inside.items()
    module = resolver.modules[path]
    calls.check(path, module)
    projections = {part: _projection(resolver, path, part) for part in ("q", "k", "v")}
    known = {part: projection for part, projection in projections.items() if projection is not None}
    return AttentionSite(
        module,
        path,
        "weight",
        site.layer,
        site.role,
        form="attention",
        layer_of=site.layer_of,
        meta=site.meta,
        geometry=_geometry(path, module, known),
        projections=known,
        calls=calls,
    )


_REASON = (
    "does not compute attention through transformers' attention interface nor by torch's scaled_dot_product_attention, "
    "so nothing can act between its projections and its softmax"
)


def _paths(site: Site, resolver: Resolver) -> Iterator[str]:
    """Returns the paths of the site's module and of those below it."""
    top = site.module_path
    return (path for path in resolver.modules if under(path, top))


def _projection(resolver: Resolver, path: str, part: str) -> Projection | None:
    """Returns the attention's own matrix (or its slices of a fused one) for a part, None if the host map lacks it."""
    for family in ("attn", "cross"):
        try:
            places = resolver.host.select(f"{family}.{part}")
        except TargetError:  # fused, and its slices are not known
            continue
        for entry, slices in places:
            if under(entry.module, path):
                site = resolver.site(entry.module, entry.tensor or "weight", f"{family}.{part}", slices)
                below = site.module_path[len(path) :].lstrip(".")
                shape = site.weight_shape
                return Projection(below, site.tensor, site.layer, slices, shape[1], shape[0])
    return None


def _size(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Returns the first of the named attributes that the module has as an integer."""
    return next((size for name in names if isinstance(size := getattr(module, name, None), int)), None)


def _geometry(path: str, module: Any, projections: Mapping[str, Projection]) -> Geometry:
    """Returns the sizes from the module's attributes, checked against its projections."""
    heads = _size(module, _HEADS) or int(module.config.num_attention_heads)
    kv_heads = heads // (_size(module, _GROUPS) or 1)
    made = {part: projection.out_features for part, projection in projections.items()}
    head_dim = _size(module, _HEAD_DIM) or made.get("k", 0) // kv_heads
    value_dim = _size(module, _VALUE_DIM) or head_dim
    if made.get("v", kv_heads * value_dim) != kv_heads * value_dim or not head_dim:
        raise UnsupportedSite(
            f"{path}: the sizes of its heads are not known: {heads} heads, {kv_heads} of them for keys, {head_dim} "
            f"wide, and projections of {made}"
        )
    return Geometry(heads, kv_heads, head_dim, value_dim)
