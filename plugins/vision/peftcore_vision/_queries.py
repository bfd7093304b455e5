"""Rows of a block that ask and are not asked: queries that see its tokens, which see nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftcore.author import Attend, AttentionOperator, AttentionSite, Operator, Site, Tap, on_first
from peftcore.errors import SequenceError
from peftcore_vision._prompts import PromptOperator, PromptSite, RowsConfig


@dataclass(frozen=True, eq=False)
class QuerySite(PromptSite):
    """A block whose queries heads read."""

    classes: tuple[int, ...] = ()
    """The outputs of each head."""


class Summing(Protocol):
    """Options of the values that heads read of queries."""

    @property
    def summary(self) -> str: ...
    @property
    def normalize(self) -> bool: ...


class QueryOperator(PromptOperator):
    """The queries of one block, and their scores for each head."""

    def __init__(self, site: QuerySite, config: RowsConfig, summing: Summing, asking: Tap, made: Tap) -> None:
        super().__init__(site, config)
        self.asking, self.made = asking, made
        self.summary, self.normalize = summing.summary, summing.normalize
        read = site.width * (config.length if summing.summary == "concat" else 1)
        self.reads = nn.ParameterList(torch.zeros(classes, read) for classes in site.classes)
        self.sums = nn.Parameter(torch.ones(config.length)) if summing.summary == "weighted" else None

    def forward(self, call: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        rows = self.rows(x, (*args, *kwargs.values()))
        count = self.length + x.shape[1]
        self.asking.put((self.length, count))
        output = call(torch.cat([rows, x], dim=1), *args, **kwargs)
        self.asking.take()
        return on_first(output, lambda y: self._parted(y, count))

    def _parted(self, y: Tensor, count: int) -> Tensor:
        if y.shape[1] > count:
            raise SequenceError("another adapter adds tokens in this block that stay; apply vqt before it")
        read = unit(self._summed(y[:, : self.length]), self.normalize)
        self.made.put([nn.functional.linear(read, each) for each in self.cast(read, *self.reads)])
        return y[:, self.length :].contiguous()  # heads may want to view it

    def _summed(self, z: Tensor) -> Tensor:
        """Return [batch, features] of queries [batch, length, d]."""
        if self.summary == "concat":
            return z.flatten(1)
        if self.sums is None:
            return z.mean(1)
        (sums,) = self.cast(z, self.sums)
        return (sums[:, None] * z).sum(1)


def unit(v: Tensor, wanted: bool) -> Tensor:
    """Return vectors with length 1, where that is wanted."""
    return nn.functional.normalize(v, dim=-1) if wanted else v


class UnaskedOperator(AttentionOperator):
    """Hides the queries of its block from all rows: their keys are behind those that operators further in have put in
    front."""

    def __init__(self, site: AttentionSite, asking: Tap) -> None:
        super().__init__(site)
        self.asking = asking

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        asking = self.asking.get()
        if asking is None:
            return attend(query, key, value)
        (length, count), rows = asking, query.shape[2]
        hidden = torch.zeros(1, 1, rows, rows, dtype=torch.bool, device=query.device)
        hidden[..., rows - count : rows - count + length] = True
        return attend.hiding(hidden, query, key, value)


class ReadingOperator(Operator):
    """Adds the scores of the blocks' queries to a head's output."""

    def __init__(self, site: Site, number: int, normalize: bool, made: Sequence[Tap]) -> None:
        super().__init__(site)
        self.number, self.normalize, self.made = number, normalize, list(made)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        made = [tap.get() for tap in self.made]
        if x.dim() != 2 or any(each is None for each in made):
            raise SequenceError("vqt wants a head that reads one vector [batch, d] an image behind all of its blocks")
        y = call(unit(x, self.normalize))
        for each in made:
            y = y + each[self.number].to(y.dtype)
        return y
