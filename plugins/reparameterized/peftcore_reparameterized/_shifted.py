"""Shifted short attention: in training, tokens attend within one group, and in half of the heads the groups begin half
a group later."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from peftcore.author import Attend, AttentionOperator, AttentionSite
from peftcore.errors import SequenceError


class GroupConfig(Protocol):
    """Options of groups."""

    @property
    def group_ratio(self) -> float: ...
    @property
    def group_size(self) -> int | None: ...


class ShiftedOperator(AttentionOperator):
    """The groups of one attention, in training only."""

    trains_only = True

    def __init__(self, site: AttentionSite, config: GroupConfig) -> None:
        super().__init__(site)
        self.ratio, self.size = config.group_ratio, config.group_size

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self.training:
            return attend(query, key, value)
        tokens = query.shape[2]
        if attend.keys != tokens:
            raise SequenceError(
                f"{tokens} tokens that train see {attend.keys}, cached or of another sequence: groups are of tokens "
                "that see each other; give whole texts, or call eval() for generation"
            )
        size = max(2, int(tokens * self.ratio)) if self.size is None else self.size
        starts = (range(0, tokens, size), (0, *range(size // 2, tokens, size)))
        plain, shifted = (
            torch.cat(
                [attend.among(start, stop, query, key, value) for start, stop in pairwise((*groups, tokens))], dim=2
            )
            for groups in starts
        )
        first = query.shape[1] // 2
        return torch.cat([plain[:, :first], shifted[:, first:]], dim=1)
