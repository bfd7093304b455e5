"""What methods with trained keys and values share: the prefix of one attention, and the network that may make it."""

from __future__ import annotations

import re
from typing import Protocol

import torch
from torch import Tensor, nn

from peftcore import Attend, AttentionOperator, AttentionSite, Surgeon
from peftcore.operators import Shared


class PrefixConfig(Protocol):
    """The options that a prefix needs."""

    @property
    def length(self) -> int: ...
    @property
    def projection(self) -> int | None: ...
    @property
    def dropout(self) -> float: ...


class Encoder(nn.Module):
    """The half of the reparametrisation that all layers of a stack share: tanh(W z + b), z one vector a position."""

    def __init__(self, length: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(length, width)
        self.hidden = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        made: Tensor = torch.tanh(self.hidden(self.embedding.weight))
        return made  # [length, hidden]


class PrefixOperator(AttentionOperator):
    """Keys and values in front of the attention's own, in the same softmax."""

    def __init__(self, site: AttentionSite, config: PrefixConfig, encoder: Shared | None, gate: bool = False) -> None:
        super().__init__(site)
        self.encoder = encoder
        if encoder is None or config.projection is None:
            self.prefix = nn.Parameter(torch.randn(config.length, prefix_width(site)))  # [length, keys and values]
        else:
            self.out = nn.Linear(config.projection, prefix_width(site))
        self.dropout = nn.Dropout(config.dropout)
        self.gate = nn.Parameter(torch.zeros(1)) if gate else None

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        front_key, front_value = self.made(len(key))
        front_key, front_value = front_key.to(key.dtype), front_value.to(value.dtype)
        plain = None if self.gate is None else attend(query, key, value)
        edited = attend(query, torch.cat([front_key, key], dim=2), torch.cat([front_value, value], dim=2))
        if plain is None or self.gate is None:
            return edited
        (gate,) = self.cast(edited, self.gate)
        return plain + gate * (edited - plain)

    def made(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[batch, kv_heads, length, width]``."""
        flat = self.prefix if self.encoder is None else self.out(self.encoder.module())
        sizes = self.geometry
        parts = flat.split([sizes.kv_heads * sizes.head_dim, sizes.kv_heads * sizes.value_dim], dim=-1)
        key, value = (part.view(len(part), sizes.kv_heads, -1).transpose(0, 1) for part in parts)
        return self.dropout(key.expand(batch, -1, -1, -1)), self.dropout(value.expand(batch, -1, -1, -1))


def prefix_width(site: AttentionSite) -> int:
    """Numbers a position: its key and its value in every head."""
    return site.geometry.kv_heads * (site.geometry.head_dim + site.geometry.value_dim)


def prefix_count(site: AttentionSite, config: PrefixConfig) -> int:
    """Values of the operator itself."""
    rows = config.length if config.projection is None else config.projection + 1
    return rows * prefix_width(site)


def shared_encoder(surgeon: Surgeon, site: AttentionSite, config: PrefixConfig) -> Shared | None:
    """The shared half for the stack of a site: encoder, decoder and cross-attention have one each."""
    hidden = config.projection
    if hidden is None:
        return None
    stack = re.sub(r"(^|\.)\d+(?=\.|$)", "", site.module_path).strip(".").replace(".", "_") or "attention"
    width = site.geometry.kv_heads * site.geometry.head_dim
    return surgeon.own(f"{stack}_{config.length}x{hidden}", lambda: Encoder(config.length, width, hidden))
