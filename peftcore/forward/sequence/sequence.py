"""Edits of the token sequence: trained rows in front of a host's token embeddings (soft prompts).

An author writes `rows`; the core inserts them where ids are embedded, in the *stack* (see `peftcore.roles.stacks`), and
extends masks, positions, token types and caches to match. Outputs keep the shape that they have without the rows: the
rows are dropped before pooling and scoring, so heads, labels and `generate` see only the user's tokens. If other stacks
attend to the output of an encoder, the encoder keeps the rows, and the masks of the other stacks get columns for them.

The results equal those of the host run on embeddings that begin with the rows. If a mask shows that a sequence begins
with padding, the rows follow the padding, so that the sequence gives the same result as alone (the key columns of
attention weights have this order too). If masks, positions or caches cannot be extended, a `SequenceError` is raised.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.contract.operators import Operator
from peftcore.errors import PluginError, SequenceError
from peftcore.forward.context.taps import Tap
from peftcore.forward.sequence.sequence_cache import SequenceCacheView, opened, self_attention_cache
from peftcore.forward.sequence.sequence_masks import Front, padding_before
from peftcore.forward.sequence.sequence_order import Order
from peftcore.roles.stacks import CACHES, EMBEDS, IDS, MEMORY, arguments, is_cache
from peftcore.targets.sequence_sites import BODY, ENTRY, FORM, READER, SequenceSite

MASK, POSITIONS, STEPS = "attention_mask", "position_ids", "cache_position"
MEMORY_MASK = "encoder_attention_mask"
MARKS = {"token_type_ids": 0, "mm_token_type_ids": 0, "visual_pos_masks": 0, "global_attention_mask": 1}
"""Arguments with an entry for each token, and the entry that the rows in front get. In windowed attention with global
tokens, the rows are global too: inside a window they would only act on the beginning of a text."""
PACKING = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})
"""Arguments of batches that pack several sequences into one."""
KNOWN = frozenset({IDS, EMBEDS, MASK, POSITIONS, STEPS, MEMORY, MEMORY_MASK, *MARKS, *CACHES})
EMPTY = SequenceCacheView(None, None, held=False)


class Rows(NamedTuple):
    """The output at the rows of a soft prompt, and the column at which the rows end."""

    states: Tensor
    """``[batch, rows, width]``."""
    behind: Tensor | None
    """``[batch]``: the number of padding columns before the rows, which is the column of the first token in the output
    without the rows; None for column 0."""


@dataclass(eq=False)
class Nest:
    """The sequence edits of one run of a stack, from the outermost to the one nearest to the blocks, for edits that act
    inside the stack."""

    path: str
    given: Mapping[str, Any]
    """The user's mask and cache, as the stack received them."""
    depths: set[int]
    """The numbers of the blocks whose key positions are needed."""
    edits: dict[str, Order] = field(default_factory=dict)
    """The positions of each edit's rows in the input of the next edit, by stamp of the operator."""
    asking: Tensor = field(default_factory=lambda: torch.empty(0))
    """``[queries]``: the positions of this forward's queries in the full sequence that blocks receive."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """The positions of the keys of each block ``[keys]``, by number of the block."""
    made: set[tuple[str, int]] = field(default_factory=set)
    """The rows that were already made, as (stamp, number of the block)."""

    def enter(self, stamp: str, order: Order, queries: Tensor, cache: SequenceCacheView) -> None:
        """Record an edit, and the positions that include its rows; `queries` holds the positions of this forward."""
        self.edits[stamp] = order
        self.asking = queries + cache.past
        for depth in self.depths:
            length, offset = len(queries), 0
            if cache.inner is not None:
                length, offset = self_attention_cache(cache.inner).get_mask_sizes(len(queries), depth)
            self.keys[depth] = torch.arange(length, device=queries.device) + offset

    def rows_among(self, stamp: str, places: Tensor) -> Tensor:
        """Returns a mask ``[batch or 1, places]``, True at the given places that hold the rows of an edit."""
        others = torch.zeros_like(places, dtype=torch.bool)[None]
        for each, order in reversed(self.edits.items()):
            places = order.origin(places)
            mine = (places < order.count) & ~others
            if each == stamp:
                return mine
            others, places = others | mine, places - order.count
        raise KeyError(stamp)

    def split(self, stamp: str) -> tuple[list[Order], Order, list[Order]]:
        """Returns three items for one edit: the orders of the edits outside of it, from the inside out; its own order;
        and the orders of the edits inside of it, from the blocks outwards."""
        stamps, orders = list(self.edits), list(self.edits.values())
        at = stamps.index(stamp)
        return orders[:at][::-1], orders[at], orders[at + 1 :][::-1]


NEST = Tap()
"""The current run of a stack in which an edit acts at inner blocks."""


class SequenceOperator(Operator):
    """Base class of operators with rows in front of the sequence of a stack: subclasses define `rows`."""

    known_by = frozenset({"stamp"})
    states: Tap | None = None
    """The tap in which a training forward stores the `Rows` of the stack's output, for methods that read them; see
    `row_logits`."""

    def __init__(self, site: SequenceSite, length: int) -> None:
        super().__init__(site)
        self.length, self.width, self.stack, self.behind = length, site.out_features, site.stack, site.behind
        self.names = {place.form: arguments(type(place.module)) for place in (site, *site.places)}
        self.stamp = uuid.uuid4().hex  # copies of a host keep it, so caches go with copies
        self.entering = Tap()  # where the rows stand that enter with this forward; None where a cache has them

    def rows(self, embeds: Tensor) -> Tensor:
        """Returns the rows for a batch of embedded tokens ``[batch, tokens, width]``: ``[length, width]``, or ``[batch,
        length, width]`` with rows for each sequence."""
        raise NotImplementedError

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        """Returns the function that acts at one of the operator's sites."""
        acts = {FORM: self._around, ENTRY: self._embed, BODY: self._leave, READER: self._read}
        return functools.partial(acts[form], module)

    def _around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the stack itself."""
        given = self._bind(FORM, args, kwargs)
        run = self._run if self.stack.entry == self.stack.path else self._wrap
        try:
            return run(module, call, given)
        finally:
            self.entering.take()

    def _run(self, module: nn.Module, call: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Run a stack that takes embeddings instead of ids."""
        key = next((name for name in CACHES if given.get(name) is not None), None)
        cache = opened(given.get(key) if key else None, self.stamp, self.length)
        batch, tokens = (given[IDS] if given.get(EMBEDS) is None else given[EMBEDS]).shape[:2]
        order = cache.order if cache.held else self._order(given.get(MASK), batch, tokens)
        self.entering.put(None if cache.held else order)
        try:
            self._begin(given, order, cache)  # edits further in come later
            self._enter(module, given, order, cache)
            if key is not None:
                given[key] = cache.inner
            output = call(**given)
        except BaseException:
            cache.abandon(self.length)
            raise
        mark = self.stamp, order
        cache.mark(mark)
        output = _with_caches(output, lambda found: cache.outward(found, mark))
        if cache.held:
            return output
        if self.states is not None and self.training:
            self.states.put(Rows(order.rows(states_of(output)), order.before))
        whole = self.length + tokens
        if self.stack.readers:
            return _along(output, order.joined, whole, batch)
        _check(output, whole if self.stack.body == self.stack.path else None, tokens)
        return _along(output, order.dropped, whole, batch)

    def _wrap(self, module: nn.Module, call: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Run a stack whose embeddings enter at an inner module; handles the mask and the outputs."""
        batch, tokens = (given[IDS] if given.get(EMBEDS) is None else given[EMBEDS]).shape[:2]
        order = self._order(given.get(MASK), batch, tokens)
        self.entering.put(order)
        given[MASK] = Front(module, order, True, self.stack.causal, EMPTY).extend(given.get(MASK), tokens)
        return _along(call(**given), order.dropped, tokens + self.length, batch)

    def _embed(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the inner module of a stack at which embeddings enter."""
        given, order = self._bind(ENTRY, args, kwargs), self.entering.get() or Order(self.length)
        if self.behind:
            return order.put(self._with_rows(call(**given)))
        self._enter(module, given, order, EMPTY)
        return call(**given)

    def _begin(self, given: dict[str, Any], order: Order, cache: SequenceCacheView) -> None:
        """Record the arguments of a stack before they are changed."""
        nest = NEST.get()
        if nest is not None and nest.path == self.stack.path:
            like = given[IDS] if given.get(EMBEDS) is None else given[EMBEDS]
            queries = torch.arange(like.shape[1] + (0 if cache.held else self.length), device=like.device)
            nest.enter(self.stamp, order, queries, cache)

    def _enter(self, module: nn.Module, given: dict[str, Any], order: Order, cache: SequenceCacheView) -> None:
        """Change the arguments of the module at which embeddings replace ids."""
        tokens = (given[IDS] if given.get(EMBEDS) is None else given[EMBEDS]).shape[1]
        if not cache.held:
            self._put_rows_in(module, given, order, tokens)
        given.update(self._shifted(given, order, enter=not cache.held))
        self._check_positions(given.get(POSITIONS), tokens, cache)
        if given.get(MASK) is not None:
            front = Front(module, order, not cache.held, self.stack.causal, cache)
            if cache.held and not torch.compiler.is_compiling() and cache.counts_places(given.get(POSITIONS)):
                front.refuse_late_padding(given[MASK], tokens)
            given[MASK] = front.extend(given[MASK], tokens)

    def _put_rows_in(self, module: nn.Module, given: dict[str, Any], order: Order, tokens: int) -> None:
        """Embed the ids and put the rows in front."""
        _refuse_unknown(given, tokens)
        ids, embeds = given.get(IDS), given.get(EMBEDS)
        if embeds is None:
            embeds = self._table(module)(ids)
        padding = self.stack.position_padding
        if given.get(POSITIONS) is None and padding is not None and ids is not None:
            count = (ids != padding).cumsum(1) * (ids != padding)  # as the host counts where it has ids
            given[POSITIONS] = count + padding
        given[IDS] = None
        given[EMBEDS] = order.put(self._with_rows(embeds))

    def _check_positions(self, places: Tensor | None, tokens: int, cache: SequenceCacheView) -> None:
        """Raise an error if rows and tokens together exceed the positions in the stack's table; `places` are the
        positions, if given or counted."""
        if self.stack.positions is None:
            return  # state-space stacks among them, whose caches count nothing
        past = cache.past if cache.held else self.length
        if isinstance(past, int):  # counts of static caches are tensors
            self.stack.check_positions(self.length, past - self.length + tokens, places)

    def _with_rows(self, embeds: Tensor) -> Tensor:
        """Returns embeddings with the rows in front."""
        rows = self.rows(embeds)
        self.check_here(rows, embeds)
        if rows.shape[-2:] != (self.length, embeds.shape[-1]):
            raise PluginError(
                f"{type(self).__name__}.rows returned a tensor of shape {tuple(rows.shape)}: return {self.length} rows "
                f"as wide as the embeddings, {embeds.shape[-1]}"
            )
        (rows,) = self.cast(embeds, rows)
        return torch.cat([rows.expand(len(embeds), -1, -1), embeds], dim=1)

    def _shifted(self, given: Mapping[str, Any], order: Order, enter: bool) -> dict[str, Any]:
        """Returns the arguments that count or describe tokens, extended for the rows in front: the positions of the
        rows start at the position of the first token, and the positions of the tokens follow."""
        count = self.length
        changed = {name: given[name] + count for name in (POSITIONS, STEPS) if given.get(name) is not None}
        if not enter:
            return changed
        if (steps := changed.get(STEPS)) is not None:
            first = torch.arange(count, device=steps.device, dtype=steps.dtype)
            changed[STEPS] = torch.cat([first, steps], dim=-1)
        if (places := given.get(POSITIONS)) is not None:
            places = places if places.dim() > 1 else places[None]
            refuse_packing(places, given)
            rows = order.first(places) + torch.arange(count, device=places.device, dtype=places.dtype)
            places = (places + count).expand(*rows.shape[:-1], -1)
            changed[POSITIONS] = order.put(torch.cat([rows, places], dim=-1), dim=-1, batch=-2)
        for name, entry in MARKS.items():
            if given.get(name) is not None:
                changed[name] = order.put(nn.functional.pad(given[name], (count, 0), value=entry))
        return changed

    def _leave(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module after the last block, in stacks that pool after it."""
        given = self._bind(BODY, args, kwargs)
        hidden = next(value for value in given.values() if isinstance(value, Tensor) and value.dim() == 3)
        order, output = self.entering.get(), call(*args, **kwargs)
        return output if order is None else _along(output, order.dropped, _rows_of(output), len(hidden))

    def _read(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a stack that attends to this one's output: its mask gets the rows' columns."""
        given = self._bind(READER, args, kwargs)
        mask, memory = given.get(MEMORY_MASK), given.get(MEMORY)
        if mask is not None and memory is not None:
            if mask.dim() != 2 or memory.shape[1] < mask.shape[1] + self.length:
                raise SequenceError(
                    f"the encoder's output has {memory.shape[1]} rows and its mask has shape {tuple(mask.shape)}, so "
                    "the soft prompt is not in the output: pass input_ids, or an encoder output computed with the same "
                    "adapters active"
                )
            given[MEMORY_MASK] = torch.cat([mask.new_ones(len(mask), self.length), mask], dim=1)
        return call(**given)

    def _bind(self, form: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names[form], args, strict=False)), **kwargs}

    def _order(self, mask: Any, batch: int, tokens: int) -> Order:
        """Returns the order of the rows that enter with this forward."""
        return Order(self.length, padding_before(mask, batch, tokens), tokens)

    def _table(self, module: nn.Module) -> nn.Module:
        """Returns the token table, which may have been replaced (resized) since; `module` is the stack or its
        embeddings."""
        below = self.stack.entry[len(self.stack.path) :].lstrip(".")
        return module.get_submodule(self.stack.table.removeprefix(f"{below}."))


def _refuse_unknown(given: Mapping[str, Any], tokens: int) -> None:
    """Refuse an unknown argument with an entry for each token: its entries for the rows are not known."""
    for name, value in given.items():
        along = isinstance(value, Tensor) and name not in KNOWN and value.dim() > 1 and value.shape[1] == tokens
        if along or (name in PACKING and value is not None):
            raise SequenceError(
                f"soft-prompt rows cannot be put in front of a sequence with {name}=, whose entries for these rows are "
                f"not known: call the model without {name}="
            )


def refuse_packing(places: Tensor, given: Mapping[str, Any]) -> None:
    """Raise SequenceError for packed sequences: without a mask, positions that restart mean that several sequences are
    packed into one."""
    alone = given.get(MASK) is None and all(given.get(name) is None for name in CACHES)
    if alone and places.dim() == 2 and not torch.compiler.is_compiling() and bool((places.diff() != 1).any()):
        raise SequenceError(
            "each packed sequence would need the soft prompt in front: pass the sequences as rows of a batch"
        )


def _check(output: Any, whole: int | None, tokens: int) -> None:
    """Check that the output is as long as the sequence (without the rows of the prompt, if they were dropped at an
    inner module)."""
    rows = _rows_of(output)
    if rows > tokens if whole is None else rows != whole:
        raise SequenceError(
            f"the model returned {rows} rows for {tokens} tokens: it pools or regroups them, and would do so with "
            "soft-prompt rows too. Use a method that adds no rows to the sequence"
        )


def states_of(output: Any) -> Tensor:
    """Returns the hidden states that a module returns."""
    if isinstance(output, Mapping | list | tuple):
        values = output.values() if isinstance(output, Mapping) else output
        output = next(value for value in values if isinstance(value, Tensor))
    states: Tensor = output
    return states


def _rows_of(output: Any) -> int:
    """Returns the length of the sequence that a module returns."""
    return states_of(output).shape[1]


def _along(output: Any, change: Callable[[Tensor, int], Tensor], whole: int, batch: int) -> Any:
    """Returns the output with `change` applied along dimensions of (at least) `whole` places: of hidden states, of the
    queries of attention weights, and of tensors with all tokens of a batch in one dimension (routers)."""
    if isinstance(output, Tensor):
        if output.dim() == 3 and output.shape[1] >= whole:
            return change(output, 1)
        if output.dim() == 4 and output.shape[2] >= whole:
            return change(output, 2)
        if output.dim() == 2 and output.shape[0] == batch * whole:
            return change(output.view(batch, whole, -1), 1).flatten(0, 1)
        return output
    return _mapped(output, lambda value: _along(value, change, whole, batch))


def _with_caches(output: Any, outward: Callable[[Any], Any]) -> Any:
    """Returns the output with its caches replaced."""
    return _mapped(output, lambda value: outward(value) if is_cache(value) else value)


def _mapped(output: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a structure with `change` applied to its entries."""
    if isinstance(output, Mapping):
        return type(output)(**{key: change(value) for key, value in output.items()})
    if isinstance(output, list | tuple):
        return type(output)(change(value) for value in output)
    return output
