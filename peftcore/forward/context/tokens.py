"""The tokens of one forward: their ids, the number of earlier tokens in the cache, and the columns at which adapters
begin to act. An adapter may begin at a certain sequence of ids in the prompt. The next forward sees only one token, so
the column of that sequence is stored with the cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.errors import MissingContext, SequenceError
from peftcore.roles.stacks import cache_in

_TOKENS = ("input_ids", "inputs_embeds")
OF_DECODER = frozenset({"decoder_input_ids", "decoder_inputs_embeds"})
"""Names of the decoder's arguments in models with an encoder and a decoder."""
NEVER = torch.iinfo(torch.int64).max
"""The value for the column of a sequence that does not occur."""
_KEPT = "_peftcore_kept"
"""The attribute of a cache that stores the columns of sequences among its tokens."""
_FILLED = "_peftcore_filled"
"""The attribute of a cache that stores a prompt, and whether the cache's first tokens belong to it."""
REMEDY = (
    "pass the first column of tokens on which the adapter acts, one for each row: with peftcore.call(model, "
    "since=[...]): ..."
)


class _Kept(NamedTuple):
    """The record about one sequence of ids that is stored with a cache."""

    since: Tensor
    """``[batch]``: the first column of the sequence's last occurrence."""
    ids: Tensor
    """``[batch, seen]``: the ids of the last columns before `end`."""
    end: int
    """The number of columns in the cache when the ids were recorded."""

    def before(self, held: int, most: int) -> Tensor:
        """Returns the last ids of a cache with `held` columns, at most `most`. Returns an empty tensor if some columns
        were not recorded."""
        stop = self.ids.shape[1] - (self.end - held)
        return self.ids[:, max(stop - most, 0) : max(stop, 0)] if self.end >= held else self.ids[:, :0]


class Prompt(NamedTuple):
    """The prompt of a running ``generate``. It is known as a whole, even if the model receives it in several
    forwards."""

    ids: Tensor
    """``[batch, tokens]``"""
    begin: int
    """The number of columns before the prompt in the cache that the user passed to ``generate``."""
    mask: Tensor | None = None
    """``[batch, begin + tokens]``, zero at padding. None if the user passed no mask to ``generate``."""

    @property
    def end(self) -> int:
        return self.begin + self.ids.shape[1]


class Tokens:
    """The tokens of one forward of the host.

    Args:
        inputs: the host's arguments by name, before its modules run.
        names: the names of all parameters of the host's forward. If they include an argument of `OF_DECODER`, the host
            has two token sequences, and `held` and `new` are unknown.
        prompt: the prompt of the running ``generate``, if there is one.

    Attributes:
        counted: whether `held` and `new` are known.
        ids: ``[batch, new]`` int64; None if the host receives embeddings.
        held: the number of token columns in the cache when the forward began, padding included.
        new: the number of columns that this forward adds.
        batch: the number of rows of the batch.
        prompt: the prompt of ``generate``, if the tokens of this forward belong to it or are generated after it.
    """

    def __init__(self, inputs: Mapping[str, Any], names: Collection[str] = (), prompt: Prompt | None = None) -> None:
        found = next((inputs[name] for name in _TOKENS if isinstance(inputs.get(name), Tensor)), None)
        self._cache = cache_in(inputs)
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
        self.prompt = prompt if prompt is not None and self._are_of(prompt) else None
        self._found: dict[tuple[int, ...], Tensor] = {}

    def since(self, sequence: Sequence[int], told: Any = None) -> Tensor:
        """Returns the first column of the last occurrence of a sequence of ids in each row: ``[batch]`` int64, on the
        device of the ids. In rows without an occurrence the value is at least ``held + new``.

        In ``generate`` only the prompt is searched, not the generated tokens. Otherwise the tokens of each forward are
        searched. The result is stored with the cache for the next forwards.

        Args:
            sequence: the ids.
            told: the columns, one per row, if the user has passed them. Then nothing is searched.

        Raises:
            MissingContext: the ids of this forward, or of the tokens in the cache, are not known.
            SequenceError: tokens in the cache were computed with another first column.
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
                f"cannot search for the token ids {[*key]}, because the token ids of this forward are not known: "
                f"{REMEDY}"
            )
        kept: dict[tuple[int, ...], _Kept] = getattr(self._cache, _KEPT, {})
        before = kept.get(key) if self.held else None
        earlier = self.ids.new_full((self.batch,), NEVER)
        if before is not None:
            since = self._of_rows(before.since).to(self.ids)
            earlier = torch.where(since < self.held, since, earlier)
        if self.prompt is not None and self.held < self.prompt.end:
            since = self._prompted(key, before, earlier, self.prompt)
        elif self.prompt is not None and before is not None:  # generated tokens
            since = earlier
        else:
            since = self._seen(key, before, earlier)
        if self._cache is not None:
            ids = self.ids if before is None else torch.cat([self._history(before, self.held), self.ids], 1)
            with suppress(AttributeError):  # a cache that takes no attributes keeps nothing
                setattr(self._cache, _KEPT, {**kept, key: _Kept(since, ids, self.held + self.new)})
        return since

    def _are_of(self, prompt: Prompt) -> bool:
        """Whether the ids of this forward and the tokens in the cache belong to the prompt. Ids after the end of the
        prompt are not compared."""
        start = self.held - prompt.begin
        if self.ids is None or not self.counted or start < 0 or self.batch % len(prompt.ids):
            return False
        filled: tuple[Any, bool] = getattr(self._cache, _FILLED, (None, True))
        if filled[0] is prompt.ids and (self.held >= prompt.end or not filled[1]):
            return filled[1]
        own = self._of_rows(prompt.ids[:, start : start + self.new]).to(self.ids)
        found = torch.equal(own, self.ids[:, : own.shape[1]])
        if self._cache is not None:
            with suppress(AttributeError):  # a cache that takes no attributes keeps nothing
                setattr(self._cache, _FILLED, (prompt.ids, found))
        return found

    def _history(self, before: _Kept | None, most: int) -> Tensor:
        """Returns the last ids that the cache holds, at most `most`, as far as they were recorded."""
        assert self.ids is not None
        return self.ids[:, :0] if before is None else self._of_rows(before.before(self.held, most)).to(self.ids)

    def _prompted(self, key: tuple[int, ...], before: _Kept | None, earlier: Tensor, prompt: Prompt) -> Tensor:
        """Returns the column at which the sequence begins in the prompt, or in the cached tokens before the prompt;
        `NEVER` if it does not occur."""
        since = _first_columns(self._of_rows(prompt.ids).to(earlier), key, prompt.begin)
        if prompt.begin:
            since = torch.where(since == NEVER, earlier, since)
            self._check_known(key, before, since)
        if bool(((since < self.held) & (since != earlier)).any()):
            raise SequenceError(
                f"{[*key]} begins among the {self.held} tokens in the cache, and some of them ran as if it did not: "
                f"{REMEDY}"
            )
        return since

    def _seen(self, key: tuple[int, ...], before: _Kept | None, earlier: Tensor) -> Tensor:
        """Returns the column at which the sequence begins, searched in the ids of this forward and the last ids before
        it; `NEVER` if it does not occur."""
        assert self.ids is not None
        tail = self._history(before, len(key) - 1)
        first = _first_columns(torch.cat([tail, self.ids], 1), key, self.held - tail.shape[1])
        acts, is_new = earlier < self.held, (first != NEVER) & (first != earlier)
        if self.held:
            is_new &= ~acts | (self.new > 1)  # a step that adds one token to what a sequence is in generates
            cut = acts & (earlier + len(key) > self.held) & (first != earlier)  # the cache was cropped inside it
            if bool((is_new & (acts | (first < self.held)) | cut).any()):
                raise SequenceError(
                    f"the adapter acts from the last occurrence of {[*key]} on, but the {self.held} tokens in the "
                    "cache ran without the part of it in this forward: pass the prompt in one forward, split it at "
                    f"another place, or {REMEDY}"
                )
        since = torch.where(is_new, first, torch.where(acts, earlier, NEVER))
        self._check_known(key, before, since)
        return since

    def _check_known(self, key: tuple[int, ...], before: _Kept | None, since: Tensor) -> None:
        """Raise MissingContext if the sequence may be in the cache among tokens that were not searched."""
        known = before is not None and before.end >= self.held
        if self.held and not known and bool((since == NEVER).any()):
            raise MissingContext(
                f"{[*key]} is not among the {self.new} tokens of this forward, and the {self.held} tokens in the cache "
                f"were not searched for it: {REMEDY}"
            )

    def _of_rows(self, value: Tensor) -> Tensor:
        """Returns a value with one entry per row. If the batch repeats its rows (beams), the entries are repeated
        too."""
        times, rest = divmod(self.batch, max(len(value), 1)) if value.dim() else (0, 1)
        if rest or not times:
            raise MissingContext(
                f"a value of shape {tuple(value.shape)} does not have one column for each of {self.batch} rows: "
                f"{REMEDY}"
            )
        return value if times == 1 else value.repeat_interleave(times, 0)


def _first_columns(ids: Tensor, sequence: tuple[int, ...], begin: int) -> Tensor:
    """Returns the column at which a sequence last begins in each row of `ids` ``[batch, tokens]``, where the first id
    has the column `begin`. `NEVER` if it does not occur."""
    if ids.shape[1] < len(sequence):
        return ids.new_full((len(ids),), NEVER)
    windows = ids.unfold(1, len(sequence), 1)  # [batch, places, length]
    matches = (windows == torch.tensor(sequence, device=ids.device)).all(-1)
    places = torch.arange(begin, begin + matches.shape[1], device=ids.device)
    last = torch.where(matches, places, -1).amax(1)
    return torch.where(last < 0, NEVER, last)
