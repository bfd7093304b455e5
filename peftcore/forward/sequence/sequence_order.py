"""The positions of soft-prompt rows in the sequences of a batch: after the padding on the left, directly before the
tokens.

Padding between rows and tokens would count like tokens: in windows and chunks of attention, in positions, in the states
of recurrent layers. The output for a sequence would then depend on the longest sequence of its batch. So each tensor
along the sequence is first concatenated with the entries of the rows, and then reordered for each sequence. This index
arithmetic never reads values on the CPU, so one compiled graph is valid for any padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Order:
    """The positions of `count` rows in the sequences of a batch.

    In *joined* tensors the soft-prompt rows are before the padding, in *ordered* tensors between padding and tokens.
    """

    count: int
    before: Tensor | None = None
    """The number of padding positions before the soft-prompt rows, ``[batch]``; None if padding is not known. Then the
    rows are first."""
    tokens: int = 0
    """The number of tokens in the forward that inserts the soft-prompt rows, padding included."""

    def origin(self, at: Tensor) -> Tensor:
        """Returns the positions in joined sequences (rows first) of entries in ordered sequences (rows after the
        padding).

        Args:
            at: the positions in the ordered sequences, ``[places]`` or ``[batch, places]``.

        Returns:
            ``[batch, places]``, or ``[1, places]`` if padding is not known.
        """
        at = at if at.dim() > 1 else at[None]
        if self.before is None:
            return at
        before = self.before.to(at.device)[:, None]
        shifted = torch.where(at < before, at + self.count, at)
        return torch.where((at >= before) & (at < before + self.count), at - before, shifted)

    def put(self, joined: Tensor, dim: int = 1, batch: int = 0) -> Tensor:
        """Returns a tensor with the soft-prompt rows moved from the front to their positions after the padding.

        Args:
            joined: a tensor in which the rows are first.
            dim: the dimension of the positions.
            batch: the dimension of the sequences.
        """
        if self.before is None:
            return joined
        return _taken(joined, self.origin(torch.arange(joined.shape[dim], device=joined.device)), dim, batch)

    def joined(self, ordered: Tensor, dim: int = 1) -> Tensor:
        """Returns a tensor with the soft-prompt rows moved to the front, given a tensor with the rows after the
        padding."""
        if self.before is None:
            return ordered
        return torch.cat([self.rows(ordered, dim), self.dropped(ordered, dim)], dim)

    def rows(self, ordered: Tensor, dim: int = 1) -> Tensor:
        """Returns only the soft-prompt rows, from a tensor in which they follow the padding."""
        if self.before is None:
            return ordered.narrow(dim, 0, self.count)
        rows = torch.arange(self.count, device=ordered.device) + self.before.to(ordered.device)[:, None]
        return _taken(ordered, rows, dim)

    def dropped(self, ordered: Tensor, dim: int = 1) -> Tensor:
        """Returns a tensor without the soft-prompt rows, given a tensor in which they follow the padding."""
        rest = ordered.shape[dim] - self.count
        if self.before is None:
            return ordered.narrow(dim, self.count, rest).contiguous()  # heads may want to view it
        at = torch.arange(rest, device=ordered.device)
        return _taken(ordered, torch.where(at < self.before.to(at.device)[:, None], at, at + self.count), dim)

    def first(self, places: Tensor) -> Tensor:
        """Returns the entry of the first token after the padding, ``[..., batch, 1]``, from a tensor ``[..., batch,
        places]`` without rows."""
        if self.before is None:
            return places[..., :1]
        return _taken(places, self.before[:, None], -1, -2)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Order:
        """Returns the order for another batch. `change` maps the padding counts ``[batch]`` of this batch to those of
        the other batch."""
        return self if self.before is None else replace(self, before=change(self.before))


def _taken(values: Tensor, index: Tensor, dim: int, batch: int = 0) -> Tensor:
    """Returns the values of a tensor along `dim` at the positions `index` ``[batch, places]``."""
    shape = [1] * values.dim()
    shape[batch], shape[dim] = index.shape
    return torch.take_along_dim(values, index.to(values.device).view(shape), dim)
