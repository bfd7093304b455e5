"""The tokens of one forward: their ids, how many a cache holds of earlier ones, and what was decided when they were
new.

What is decided about the tokens of a prompt is kept with the cache that the forward fills, and goes on with copies of
it: the next forward sees one token, and goes by what the prompt was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.errors import MissingContext

CACHES = ("past_key_values", "cache", "past_key_value", "cache_params")
"""The names under which transformers hands its caches on."""
_TOKENS = ("input_ids", "inputs_embeds")
OF_DECODER = frozenset({"decoder_input_ids", "decoder_inputs_embeds"})
"""Arguments of models that have an encoder and a decoder."""
_KEPT = "_peftcore_kept"
"""The attribute of a cache in which decisions about its tokens are kept."""
REMEDY = "say from which column of tokens on it acts, one for each row: with peftcore.call(model, since=[...]): ..."


class _Kept(NamedTuple):
    """The record that is kept with a cache about one sequence of ids."""

    since: Tensor
    """``[batch]``: the first column of its last occurrence."""
    tail: Tensor
    """``[batch, length - 1]``: the last ids, with which an occurrence may begin."""
    end: int
    """How many columns the cache held then."""


class Tokens:
    """The tokens of one forward of the host.

    Args:
        inputs: the host's arguments by name, before any of its modules runs.
        names: the names of all that its forward takes. What has an encoder and a decoder has tokens of two kinds, and
            none are counted.

    Attributes:
        counted: whether the columns are known.
        ids: ``[batch, new]`` int64; None where the host is given embeddings.
        held: how many columns of tokens the cache held when the forward began, padding included.
        new: how many columns this forward adds.
        batch: the rows of the batch.
    """

    def __init__(self, inputs: Mapping[str, Any], names: Collection[str] = ()) -> None:
        found = next((inputs[name] for name in _TOKENS if isinstance(inputs.get(name), Tensor)), None)
        self._cache = next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)
        self.counted = found is not None and found.dim() > 1 and OF_DECODER.isdisjoint(names)
        counted = found if found is not None and self.counted else torch.empty(0, 0)
        self.batch, self.new = int(counted.shape[0]), int(counted.shape[1])
        self.ids = found if found is not None and not found.is_floating_point() else None
        self.held = 0
        if self._cache is not None:
            try:
                self.held = int(self._cache.get_seq_length())
            except (AttributeError, ValueError):  # caches of states count no tokens
                self.counted = False
        self._found: dict[tuple[int, ...], Tensor] = {}

    def since(self, sequence: Sequence[int], told: Any = None) -> Tensor:
        """Returns the first column of the last occurrence of a sequence of ids in each row: ``[batch]`` int64, on the
        device of the ids; ``held + new`` or more where there is none.

        It is decided by the forward that sees the sequence, and kept with the cache for those that go on from there. An
        occurrence may have begun in the forward before.

        Args:
            sequence: the ids.
            told: the columns, where the caller says them: one for each row.

        Raises:
            MissingContext: the ids of this forward, or those in the cache, were not seen.
        """
        key = tuple(sequence)
        if told is not None:
            return self._of_rows(torch.as_tensor(told))
        if key not in self._found:
            self._found[key] = self._find(key)
        return self._found[key]

    def _find(self, key: tuple[int, ...]) -> Tensor:
        if self.ids is None or not self.counted:
            raise MissingContext(
                f"no ids of tokens are given to the model in which {list(key)} could be found: {REMEDY}"
            )
        kept: dict[tuple[int, ...], _Kept] = getattr(self._cache, _KEPT, {})
        before = kept.get(key) if self.held else None
        whole = before is not None and before.end == self.held  # else the cache was cropped
        tail = self._of_rows(before.tail) if before is not None and whole else self.ids[:, :0]
        seen = torch.cat([tail.to(self.ids), self.ids], 1)
        first = _last_occurrence(seen, key)  # -1 where there is none
        never = torch.iinfo(torch.int64).max
        since = torch.where(first < 0, never, first + self.held - tail.shape[1])
        if before is not None:
            earlier = self._of_rows(before.since).to(since)
            since = torch.where(earlier < self.held, earlier, since)
        elif self.held and bool((since == never).any()):
            raise MissingContext(
                f"{list(key)} is not among the {self.new} tokens of this forward, and nobody looked for it among the "
                f"{self.held} in the cache, which it goes on from: {REMEDY}"
            )
        if self._cache is not None:
            rest = seen[:, max(seen.shape[1] - len(key) + 1, 0) :]
            with suppress(AttributeError):  # a cache that takes no attributes keeps nothing
                setattr(self._cache, _KEPT, {**kept, key: _Kept(since, rest, self.held + self.new)})
        return since

    def _of_rows(self, value: Tensor) -> Tensor:
        """Returns a value with an entry for each row: those of a batch before it was repeated (beams) are repeated."""
        times, rest = divmod(self.batch, max(len(value), 1)) if value.dim() else (0, 1)
        if rest or not times:
            raise MissingContext(
                f"{tuple(value.shape)} says not from which column on each of {self.batch} rows is meant: {REMEDY}"
            )
        return value if times == 1 else value.repeat_interleave(times, 0)


def _last_occurrence(ids: Tensor, sequence: tuple[int, ...]) -> Tensor:
    """Returns where a sequence last begins in each row ``[batch, tokens]``; -1 where it does not occur."""
    if ids.shape[1] < len(sequence):
        return ids.new_full((len(ids),), -1)
    windows = ids.unfold(1, len(sequence), 1)  # [batch, places, length]
    matches = (windows == torch.tensor(sequence, device=ids.device)).all(-1)
    places = torch.arange(matches.shape[1], device=ids.device)
    return torch.where(matches, places, -1).amax(1)
