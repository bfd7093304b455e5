"""Base operator and options of methods with trained keys and values: the prefix of one attention, and the network that
may make it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftcore.author import (
    Attend,
    AttentionOperator,
    AttentionSite,
    InputOperator,
    MethodConfig,
    Mine,
    SequenceSite,
    Shared,
    Site,
    Surgeon,
    cache_in,
)


class PrefixConfig(Protocol):
    """Options of methods with a prefix."""

    @property
    def length(self) -> int: ...
    @property
    def projection(self) -> int | None: ...
    @property
    def dropout(self) -> float: ...


class Encoder(nn.Module):
    """The half of the prefix network that all layers of a stack share: tanh(W z + b), z one vector a position."""

    def __init__(self, length: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(length, width)
        self.hidden = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        made: Tensor = torch.tanh(self.hidden(self.embedding.weight))
        return made  # [length, hidden]


class FrontOperator(AttentionOperator):
    """Puts keys and values in front of the attention's own, in the same softmax: subclasses say which, in `flat`."""

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        front_key, front_value = self.made(len(key))
        front_key, front_value = front_key.to(key.dtype), front_value.to(value.dtype)
        return attend(query, torch.cat([front_key, key], dim=2), torch.cat([front_value, value], dim=2))

    def flat(self) -> Tensor:
        """Return them as one row a position, keys before values, ``[length, 2 * kv_heads * width]``."""
        raise NotImplementedError

    def made(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return them by heads, ``[batch, kv_heads, length, width]``."""
        sizes = self.geometry
        parts = self.flat().split([sizes.kv_heads * sizes.head_dim, sizes.kv_heads * sizes.value_dim], dim=-1)
        key, value = (part.view(len(part), sizes.kv_heads, -1).transpose(0, 1) for part in parts)
        return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)


class PrefixOperator(FrontOperator):
    """A prefix that trains itself or is made by a network, with a gate if asked for."""

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
        if self.encoder is not None:
            self.check_here(self.encoder.module.embedding.weight, query)
        plain = None if self.gate is None else attend(query, key, value)
        edited = super().forward(attend, query, key, value)
        if plain is None or self.gate is None:
            return edited
        (gate,) = self.cast(edited, self.gate)
        return plain + gate * (edited - plain)

    def flat(self) -> Tensor:
        rows: Tensor = self.prefix if self.encoder is None else self.out(self.encoder.module())
        return rows

    def made(self, batch: int) -> tuple[Tensor, Tensor]:
        key, value = super().made(batch)
        return self.dropout(key), self.dropout(value)


def prefix_width(site: AttentionSite) -> int:
    """Return how many numbers a position has: its key and its value in every head."""
    return site.geometry.kv_heads * (site.geometry.head_dim + site.geometry.value_dim)


def prefix_count(site: Site, config: PrefixConfig, gate: bool = False) -> int:
    """Count the parameters of an operator itself, without the shared network: those of a prefix, none of positions."""
    if not isinstance(site, AttentionSite):
        return 0
    rows = config.length if config.projection is None else config.projection + 1
    return rows * prefix_width(site) + gate


def shared_encoder(
    surgeon: Surgeon, site: AttentionSite, config: PrefixConfig, make: Callable[[int, int, int], Encoder] = Encoder
) -> Shared | None:
    """Return the half of the network that the stack of a site shares, as `make` makes it: encoder, decoder and
    cross-attention have one each."""
    hidden = config.projection
    if hidden is None:
        return None
    stack = re.sub(r"(^|\.)\d+(?=\.|$)", "", site.module_path).strip(".").replace(".", "_") or "attention"
    width = site.geometry.kv_heads * site.geometry.head_dim
    return surgeon.own(f"{stack}_{config.length}x{hidden}", lambda: make(config.length, width, hidden))


class Behind(InputOperator):
    """Starts the positions of a stack's tokens behind a prefix of so many keys."""

    def __init__(self, site: SequenceSite, config: Any) -> None:
        super().__init__(site)
        self.length, self.stack = config.length, site.stack

    def arguments(self, given: dict[str, Any], mine: Mine) -> dict[str, Any]:
        places, ids, padding = given.get("position_ids"), given.get("input_ids"), self.stack.position_padding
        tokens, cache = given["inputs_embeds"] if ids is None else ids, cache_in(given)  # [batch, tokens, ...]
        rows = mine(tokens)
        length = self.length if rows is None else self.length * rows.long()[:, None]  # [batch, 1]
        held = 0 if cache is None else cache.get_seq_length()
        if places is not None:
            places = places + length
        elif padding is None:
            places = torch.arange(tokens.shape[1], device=tokens.device)[None] + length + held
        elif ids is not None:  # RoBERTa counts what is no padding
            counted = ids != padding
            places = (counted.cumsum(1) + length) * counted + padding
        if places is not None and isinstance(held, int):  # counts of static caches are tensors
            self.stack.check_positions(self.length, held + tokens.shape[1], places, "keys")
        return {**given, "position_ids": places}


def behind(surgeon: Surgeon, sites: Iterable[Site], config: MethodConfig) -> None:
    """Start the positions of the tokens behind the prefix, in all stacks that hold `sites` and number their tokens."""
    paths = [f"{site.module_path}." for site in sites]
    for stack in surgeon.sites("stack", optional=True):
        if any(path.startswith(f"{stack.module_path}.".lstrip(".")) for path in paths):
            if "position_ids" in stack.arguments:
                surgeon.graft(surgeon.sequence_site(stack), Behind, config)
            else:
                name = type(stack.module).__name__
                surgeon.notices.append(f"{name} takes no position_ids, so its tokens stay where they are")
