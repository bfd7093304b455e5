"""The positions of rows in front of the sequences of a batch: after the padding on the left, next to each sequence's
tokens.

Padding between rows and tokens would count like tokens: in windows and chunks of attention, in positions, in the states
of recurrent layers. The output for a sequence would then depend on the longest sequence of its batch. So each tensor
along the sequence is first joined with the entries of the rows in front, and then reordered for each sequence. This is
index arithmetic that reads no values on the host, so one compiled graph serves any padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Order:
    """The places of `count` rows in the sequences of a batch.

    In *joined* tensors the rows are first, in *ordered* tensors they follow the padding.
    """

    count: int
    before: Tensor | None = None
    """The number of padding places before the rows, [batch]; None if padding is not known: then the rows are first."""
    tokens: int = 0
    """The number of tokens in the forward with which the rows entered, padding included."""

    def origin(self, at: Tensor) -> Tensor:
        """Returns, for the given places ([places] or [batch, places]) of ordered sequences, the places of the same
        entries in joined sequences: [batch, places], or [1, places] where all have the same order."""
        at = at if at.dim() > 1 else at[None]
        if self.before is None:
            return at
        before = self.before.to(at.device)[:, None]
        shifted = torch.where(at < before, at + self.count, at)
        return torch.where((at >= before) & (at < before + self.count), at - before, shifted)

    def put(self, joined: Tensor, dim: int = 1, batch: int = 0) -> Tensor:
        """Returns a joined tensor in order, along `dim`; its sequences are along `batch`."""
        if self.before is None:
            return joined
        return _taken(joined, self.origin(torch.arange(joined.shape[dim], device=joined.device)), dim, batch)

    def joined(self, ordered: Tensor, dim: int = 1) -> Tensor:
        """Returns an ordered tensor with the rows first."""
        if self.before is None:
            return ordered
        return torch.cat([self.rows(ordered, dim), self.dropped(ordered, dim)], dim)

    def rows(self, ordered: Tensor, dim: int = 1) -> Tensor:
        """Returns the rows of an ordered tensor alone."""
        if self.before is None:
            return ordered.narrow(dim, 0, self.count)
        rows = torch.arange(self.count, device=ordered.device) + self.before.to(ordered.device)[:, None]
        return _taken(ordered, rows, dim)

    def dropped(self, ordered: Tensor, dim: int = 1) -> Tensor:
        """Returns an ordered tensor without the rows."""
        rest = ordered.shape[dim] - self.count
        if self.before is None:
            return ordered.narrow(dim, self.count, rest).contiguous()  # heads may want to view it
        at = torch.arange(rest, device=ordered.device)
        return _taken(ordered, torch.where(at < self.before.to(at.device)[:, None], at, at + self.count), dim)

    def first(self, places: Tensor) -> Tensor:
        """Returns the entries of the first token after the padding in a tensor of [..., batch, places]: [..., batch,
        1]."""
        if self.before is None:
            return places[..., :1]
        return _taken(places, self.before[:, None], -1, -2)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Order:
        """Returns the order of another batch: `change` maps the padding counts [batch] of this batch to the padding
        counts of the other batch."""
        return self if self.before is None else replace(self, before=change(self.before))


def _taken(values: Tensor, index: Tensor, dim: int, batch: int = 0) -> Tensor:
    """Returns the values at an index of [batch, places] along `dim`."""
    shape = [1] * values.dim()
    shape[batch], shape[dim] = index.shape
    return torch.take_along_dim(values, index.to(values.device).view(shape), dim)
