"""A very narrow attention in parallel with the stream, its layers in the model's cache, and a function that finds the
stream in a block."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import BranchSite, Site, Surgeon, branch
from peftcore.errors import UnsupportedSite
from peftcore_additive._bottleneck import width_of
from peftcore_additive._side import SideLayer, side_layers

JOINED = "joined"
"""The `form` of a site at the norm that reads the sum of stream and attention."""


class TinyAttention(nn.Module):
    """One narrow attention, which returns the change of the stream."""

    def __init__(self, features: int, config: Any) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.norm = nn.LayerNorm(features)
        self.down = nn.Linear(features, 3 * config.width)
        self.attention = nn.MultiheadAttention(config.width, config.heads)  # for its tensors and their start
        self.up = nn.Linear(config.width, features)
        with torch.no_grad():
            for tensor in self.up.parameters():
                tensor.mul_(config.out_scale)

    def forward(self, h: Tensor, visible: Tensor, cache: Any = None) -> Tensor:
        """Map `h` ``[batch, tokens, d]`` to the same shape. `visible` ``[.., 1, tokens, held + tokens]`` is True
        where a token attends to another."""
        given = zip(
            self.down(self.norm(h)).chunk(3, -1),
            self.attention.in_proj_weight.chunk(3),
            self.attention.in_proj_bias.chunk(3),
            strict=True,
        )
        parts = [nn.functional.linear(*each).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in given]
        query, key, value = parts  # [batch, heads, tokens, a / heads]
        if cache is not None:
            key, value = cache.update(key, value)
        dropout = self.dropout if self.training else 0.0
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        added: Tensor = self.up(self.attention.out_proj(seen.transpose(1, 2).flatten(-2)))
        return added


@dataclass(frozen=True)
class Room:
    """The layers for keys and values of earlier tokens, which follow the model's own layers in the model's cache."""

    count: int
    blocks: int
    stamp: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)

    def layers(self, given: dict[str, Any]) -> list[SideLayer]:
        """Return this network's layers of the cache that a block's arguments contain; an empty list without a cache."""
        return side_layers(given, self.stamp, self.count, self.blocks)


def placed(surgeon: Surgeon, site: Site) -> tuple[BranchSite, bool]:
    """Return the site at the end of an attention, with the modules at which the stream can be read. The second value is
    True if the site's output already is the stream.

    Raises:
        UnsupportedSite: it is unknown what the block adds to the stream.
    """
    end = surgeon.resolver.end_of(site.module_path)
    if end is not None and end.entered is not None:  # by a norm, of which the stream goes on
        norm = replace(surgeon.resolver.site(end.entered, "weight", "norm"), form=JOINED)
        return BranchSite(**vars(site), width=width_of(site), places=(norm,)), False
    if end is None or (end.rest and end.left is None):
        raise UnsupportedSite(
            f"{site.path}: the block's own code drops or scales the attention's output, so the stream after it cannot "
            "be located; exclude this block"
        )
    return branch(surgeon, site, before_norm=True), bool(end.rest)
