"""Blocks of side networks that run in parallel with the model, and layers in the model's cache for their keys and
values.

The layers of a side network follow the host's layers in the cache, so operations that reorder, repeat, crop or empty
the cache apply to them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import cache_in, forward_context, self_attention_cache
from peftcore.errors import SequenceError


class SideBlock(nn.Module):
    """A block of the side network: it mixes the output of one of the model's blocks into the side stream, and applies
    one narrow transformer block."""

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
        z = z + self.dropout(self.out(attended(self.qkv(self.norm1(z)), self.heads, visible, cache)))
        return z + self.dropout(self.feed_forward(self.norm2(z)))


class PostNormBlock(nn.Module):
    """A transformer block like BERT's, w wide: attention, then a feed-forward with an inner width of 4 w, each followed
    by a residual sum and a norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = math.gcd(width, heads)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor, cache: Any) -> Tensor:
        dropped = self.dropout.p if self.training else 0.0
        x = self.norm1(x + self.dropout(self.out(attended(self.qkv(x), self.heads, visible, cache, dropped))))
        y: Tensor = self.norm2(x + self.dropout(self.feed_forward(x)))
        return y


def attended(qkv: Tensor, heads: int, visible: Tensor, cache: Any, dropout: float = 0.0) -> Tensor:
    """Return the attention's output ``[batch, tokens, w]`` for concatenated queries, keys and values ``[batch, tokens,
    3 w]``. `visible` ``[.., 1, tokens, held + tokens]`` is True where a token attends to another one. `cache` is None,
    or a layer that stores the keys and values of earlier tokens."""
    parts = qkv.unflatten(-1, (3, heads, -1))  # [batch, tokens, 3, heads, w / heads]
    query, key, value = parts.permute(2, 0, 3, 1, 4)
    key, value = (key, value) if cache is None else cache.update(key, value)
    taken = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
    return taken.transpose(1, 2).flatten(-2)


class Ends(torch.autograd.Function):
    """Returns h as if it were computed from x, without a gradient for x. Reentrant checkpoints need this: their outputs
    must require a gradient if their inputs do."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True)
class SideLayer:
    """A layer of the model's cache for a side network. It may be used by operators that get all rows of the batch, or
    only some of them."""

    kept: Any
    """The transformers cache layer, which stores all rows."""

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens, and return the keys and values of all tokens so far."""
        keys, values = forward_context().keep_rows(self.kept.update, key, value)
        return keys, values

    def get_seq_length(self) -> Any:
        """Return how many tokens the layer stores."""
        return self.kept.get_seq_length()


def side_layers(given: Mapping[str, Any], stamp: str, count: int, blocks: int) -> list[SideLayer]:
    """Return the `count` layers of a side network in the cache. The network is identified by `stamp`; its layers are
    created if the cache lacks them, after the `blocks` layers of the host. The list is empty if the block's arguments
    `given` do not contain a cache."""
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
    return [SideLayer(layer) for layer in mine]


def held_by(layers: list[SideLayer], held: int) -> int:
    """Return how many tokens the side layers of the cache store. This number must equal `held`, the number of tokens in
    the model's own layers.

    Raises:
        SequenceError: the numbers differ.
    """
    mine = layers[0].get_seq_length() if layers else 0
    if mine != held and not torch.compiler.is_compiling():  # compilers are not told what static caches hold
        raise SequenceError(
            f"the cache holds {held} tokens, but the side network has seen {mine} of them; start with an empty cache, "
            "and keep the injection active while the cache fills"
        )
    return int(mine)
