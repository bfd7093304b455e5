"""A side network beside the model: its blocks, and room in the model's cache for their keys and values.

That room is more layers behind the host's own: whatever reorders, repeats, crops or empties the cache does the same to
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import cache_in, self_attention_cache
from peftcore.errors import SequenceError


class SideBlock(nn.Module):
    """A block of the side network: what block l returned joins the side stream, and one narrow transformer block
    follows."""

    def __init__(self, width: int, narrow: int, heads: int, temperature: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.temperature = math.gcd(narrow, heads), temperature
        self.down, self.gate = nn.Linear(width, narrow), nn.Parameter(torch.zeros(1))
        self.norm1, self.norm2 = nn.LayerNorm(narrow), nn.LayerNorm(narrow)
        self.qkv, self.out = nn.Linear(narrow, 3 * narrow), nn.Linear(narrow, narrow)
        self.feed_forward = nn.Sequential(nn.Linear(narrow, 4 * narrow), nn.GELU(), nn.Linear(4 * narrow, narrow))
        self.dropout = nn.Dropout(dropout)

    def forward(self, z: Tensor, state: Tensor, visible: Tensor, cache: Any) -> Tensor:
        mu = torch.sigmoid(self.gate / self.temperature)
        z = mu * z + (1 - mu) * self.down(state)
        parts = self.qkv(self.norm1(z)).unflatten(-1, (3, self.heads, -1))  # [batch, tokens, 3, heads, w / heads]
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        key, value = (key, value) if cache is None else cache.update(key, value)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        z = z + self.dropout(self.out(attended.transpose(1, 2).flatten(-2)))
        return z + self.dropout(self.feed_forward(self.norm2(z)))


class Ends(torch.autograd.Function):
    """Returns h as a function of x whose gradient ends here: reentrant checkpoints want outputs that require a gradient
    where their inputs do."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None]:
        return None, None


def side_layers(given: Mapping[str, Any], stamp: str, count: int, blocks: int) -> list[Any]:
    """Return the `count` cache layers of the network with a stamp, made where the cache has none yet; none where a
    block of a stack of so many `blocks` is given no cache (its arguments by name)."""
    cache = cache_in(given)
    if cache is None:
        return []
    from transformers.cache_utils import DynamicLayer

    own = self_attention_cache(cache)
    layers = own.layers
    mine = [layer for layer in layers if vars(layer).get("side") == stamp]
    if not mine:
        while len(layers) < blocks:  # those of the host come first, also where it adds them as it goes
            layers.append(own.layer_class_to_replicate())
        mine = [DynamicLayer() for _ in range(count)]
        for layer in mine:
            layer.side = stamp
            layer.is_compileable = own.is_compileable  # hosts ask this of the whole before they leave a mask out
        layers.extend(mine)
    return mine


def held_by(layers: list[Any], held: int) -> int:
    """Return how many tokens the cache layers hold, which have to be as many as the model's own hold (`held`).

    Raises:
        SequenceError: they are not.
    """
    mine = layers[0].get_seq_length() if layers else 0
    if mine != held and not torch.compiler.is_compiling():  # compilers are not told what static caches hold
        raise SequenceError(
            f"this cache holds {held} tokens, of which the side network has seen {mine}; start with an empty cache, "
            "and leave the injection active while it fills"
        )
    return int(mine)
