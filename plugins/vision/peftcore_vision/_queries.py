"""Rows of a block that ask and are not asked: queries that see its tokens, which see nothing of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore import Attend, AttentionOperator, AttentionSite, Site, Tap, on_first
from peftcore.errors import SequenceError
from peftcore_vision._prompts import PromptOperator, PromptSite, RowsConfig


class QueryOperator(PromptOperator):
    """The queries of one block."""

    def __init__(self, site: PromptSite, config: RowsConfig, asking: Tap, made: Tap) -> None:
        super().__init__(site, config)
        self.asking, self.made = asking, made

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
        self.made.put(y[:, : self.length])
        return y[:, self.length :].contiguous()  # heads may want to view it


class UnaskedOperator(AttentionOperator):
    """Hides the queries of its block from all rows: they lie behind what was put in front of them further in."""

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


@dataclass(frozen=True, eq=False)
class ReadingSite(Site):
    """A head that reads what blocks make of queries."""

    width: int = 0
    blocks: int = 0

    def _make_path(self) -> str:
        return f"{super()._make_path()}:beside"  # it leaves the head to what adapts or replaces it
