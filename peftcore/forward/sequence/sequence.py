"""Edits of the token sequence: trained rows in front of a host's token embeddings (soft prompts).

The author of a method defines `rows`. The core inserts these rows at the module that embeds the token ids, the *stack*
(see `peftcore.roles.stacks`). It extends masks, positions, token types and caches to match. Outputs keep the shape that
they have without the rows: the rows are removed before pooling and scoring, so heads, labels and `generate` see only
the user's tokens. There is one exception: if a decoder attends to the output of an encoder, this output keeps the rows,
and the decoder's mask of the encoder gets columns for them.

The results equal those of the host for embeddings that begin with the rows. If a mask shows that a sequence begins with
padding, the rows are inserted after the padding, so the sequence gives the same result as alone. The key columns of
attention weights have this order too. If masks, positions or caches cannot be extended, a `SequenceError` is raised.
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
"""Arguments with one entry per token, and the entry that rows of the soft prompt get. In windowed attention with global
tokens, the rows are global too. If they were not, only the tokens at the beginning of a text would attend to them."""
PACKING = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})
"""Arguments of batches that pack several sequences into one."""
KNOWN = frozenset({IDS, EMBEDS, MASK, POSITIONS, STEPS, MEMORY, MEMORY_MASK, *MARKS, *CACHES})
EMPTY = SequenceCacheView(None, None, held=False)


class Rows(NamedTuple):
    """The hidden states at the rows of a soft prompt, and the number of padding columns before these rows."""

    states: Tensor
    """``[batch, rows, width]``."""
    behind: Tensor | None
    """``[batch]``: the number of padding columns before the soft-prompt rows. In the output without the rows, it is the
    column of the first token. None if the rows are first."""


@dataclass(eq=False)
class Nest:
    """The sequence edits (operators that insert rows) of one run of a stack (the module that embeds token ids and runs
    the blocks), outermost first. Used only if an edit acts at inner blocks."""

    path: str
    given: Mapping[str, Any]
    """The user's mask and cache, as the stack of blocks received them."""
    depths: set[int]
    """The numbers of the blocks for which `keys` is computed."""
    edits: dict[str, Order] = field(default_factory=dict)
    """For each edit (an operator that inserts rows), the positions of its rows in the input of the next inner edit. The
    key is the stamp of the operator, a unique string."""
    asking: Tensor = field(default_factory=lambda: torch.empty(0))
    """``[queries]``: the positions of this forward's queries in the full sequence of the blocks, which includes all
    rows."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """For each block number, the positions of the attention keys ``[keys]``."""
    made: set[tuple[str, int]] = field(default_factory=set)
    """The soft-prompt rows that this run has already computed, as (stamp of the operator, number of the block)."""

    def enter(self, stamp: str, order: Order, queries: Tensor, cache: SequenceCacheView) -> None:
        """Record an edit (an operator that inserts rows), and compute the positions of queries and keys with its rows
        included. `queries` contains the positions of this forward."""
        self.edits[stamp] = order
        self.asking = queries + cache.past
        for depth in self.depths:
            length, offset = len(queries), 0
            if cache.inner is not None:
                length, offset = self_attention_cache(cache.inner).get_mask_sizes(len(queries), depth)
            self.keys[depth] = torch.arange(length, device=queries.device) + offset

    def rows_among(self, stamp: str, places: Tensor) -> Tensor:
        """Returns a mask ``[batch or 1, places]``: True at those of the positions `places` that contain rows of the
        given edit."""
        others = torch.zeros_like(places, dtype=torch.bool)[None]
        for each, order in reversed(self.edits.items()):
            places = order.origin(places)
            mine = (places < order.count) & ~others
            if each == stamp:
                return mine
            others, places = others | mine, places - order.count
        raise KeyError(stamp)

    def split(self, stamp: str) -> tuple[list[Order], Order, list[Order]]:
        """Returns three items for one edit (an operator that inserts rows): the `Order` of each edit outside it,
        nearest first; its own `Order`; and the `Order` of each edit inside it, nearest to the blocks first."""
        stamps, orders = list(self.edits), list(self.edits.values())
        at = stamps.index(stamp)
        return orders[:at][::-1], orders[at], orders[at + 1 :][::-1]


NEST = Tap()
"""The tap (a value stored for one forward) with the `Nest` of the running stack, if rows are computed at inner
blocks."""


class SequenceOperator(Operator):
    """Base class of operators that insert rows before the tokens of a stack (the module that embeds token ids and runs
    the blocks). Subclasses define `rows`."""

    known_by = frozenset({"stamp"})
    states: Tap | None = None
    """The tap (a value stored for one forward) in which a training forward stores the `Rows` of the stack's output.
    Only for methods that read them; see `row_logits`."""

    def __init__(self, site: SequenceSite, length: int) -> None:
        super().__init__(site)
        self.length, self.width, self.stack, self.behind = length, site.out_features, site.stack, site.behind
        self.names = {place.form: arguments(type(place.module)) for place in (site, *site.places)}
        self.stamp = uuid.uuid4().hex  # copies of a host keep it, so caches go with copies
        self.entering = Tap()  # where the rows stand that enter with this forward; None where a cache has them

    def rows(self, embeds: Tensor) -> Tensor:
        """Returns the soft-prompt rows to insert before embedded tokens ``[batch, tokens, width]``. The shape is
        ``[length, width]``, or ``[batch, length, width]`` if each sequence has different rows."""
        raise NotImplementedError

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        """Returns the function that wraps the forward of `module`. `form` names the module's part in the stack of
        blocks."""
        acts = {FORM: self._around, ENTRY: self._embed, BODY: self._leave, READER: self._read}
        return functools.partial(acts[form], module)

    def _around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the stack of blocks with changed arguments, and remove the soft-prompt rows from its output."""
        given = self._bind(FORM, args, kwargs)
        run = self._run if self.stack.entry == self.stack.path else self._wrap
        try:
            return run(module, call, given)
        finally:
            self.entering.take()

    def _run(self, module: nn.Module, call: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Run a stack of blocks that accepts embeddings instead of ids."""
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
        """Run a stack of blocks in which an inner module accepts the embeddings. Extends the mask, and removes the
        soft-prompt rows from the output."""
        batch, tokens = (given[IDS] if given.get(EMBEDS) is None else given[EMBEDS]).shape[:2]
        order = self._order(given.get(MASK), batch, tokens)
        self.entering.put(order)
        given[MASK] = Front(module, order, True, self.stack.causal, EMPTY).extend(given.get(MASK), tokens)
        return _along(call(**given), order.dropped, tokens + self.length, batch)

    def _embed(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the inner module of a stack of blocks that accepts the embeddings."""
        given, order = self._bind(ENTRY, args, kwargs), self.entering.get() or Order(self.length)
        if self.behind:
            return order.put(self._with_rows(call(**given)))
        self._enter(module, given, order, EMPTY)
        return call(**given)

    def _begin(self, given: dict[str, Any], order: Order, cache: SequenceCacheView) -> None:
        """Record the arguments of a stack of blocks before they are changed."""
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
        """Embed the ids, and insert the soft-prompt rows before the tokens."""
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
        """Raise an error if rows and tokens together exceed the stack's table of positions. `places` are the positions
        that the module receives, or None."""
        if self.stack.positions is None:
            return  # state-space stacks among them, whose caches count nothing
        past = cache.past if cache.held else self.length
        if isinstance(past, int):  # counts of static caches are tensors
            self.stack.check_positions(self.length, past - self.length + tokens, places)

    def _with_rows(self, embeds: Tensor) -> Tensor:
        """Returns embeddings with the soft-prompt rows before them."""
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
        """Returns the changed arguments that count or describe tokens, extended for the soft-prompt rows. The positions
        of the rows start at the position of the first token, and the positions of the tokens continue after them."""
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
        """Run the module after the last block, and remove the soft-prompt rows from its output. For stacks that pool
        afterwards."""
        given = self._bind(BODY, args, kwargs)
        hidden = next(value for value in given.values() if isinstance(value, Tensor) and value.dim() == 3)
        order, output = self.entering.get(), call(*args, **kwargs)
        return output if order is None else _along(output, order.dropped, _rows_of(output), len(hidden))

    def _read(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a decoder that attends to this stack's output: its mask of that output gets columns for the soft-prompt
        rows."""
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
        """Returns the positions of the soft-prompt rows that are inserted in this forward."""
        return Order(self.length, padding_before(mask, batch, tokens), tokens)

    def _table(self, module: nn.Module) -> nn.Module:
        """Returns the current token table, which may have been resized (replaced) after the adapter was applied.
        `module` is the stack of blocks or its embeddings."""
        below = self.stack.entry[len(self.stack.path) :].lstrip(".")
        return module.get_submodule(self.stack.table.removeprefix(f"{below}."))


def _refuse_unknown(given: Mapping[str, Any], tokens: int) -> None:
    """Raise SequenceError if an unknown argument has one entry per token, because the entries for the soft-prompt rows
    are not known."""
    for name, value in given.items():
        along = isinstance(value, Tensor) and name not in KNOWN and value.dim() > 1 and value.shape[1] == tokens
        if along or (name in PACKING and value is not None):
            raise SequenceError(
                f"soft-prompt rows cannot be put in front of a sequence with {name}=, whose entries for these rows are "
                f"not known: call the model without {name}="
            )


def refuse_packing(places: Tensor, given: Mapping[str, Any]) -> None:
    """Raise SequenceError if several sequences are packed into one. Without a mask, positions that restart show
    this."""
    alone = given.get(MASK) is None and all(given.get(name) is None for name in CACHES)
    if alone and places.dim() == 2 and not torch.compiler.is_compiling() and bool((places.diff() != 1).any()):
        raise SequenceError(
            "each packed sequence would need the soft prompt in front: pass the sequences as rows of a batch"
        )


def _check(output: Any, whole: int | None, tokens: int) -> None:
    """Check the length of the output. It must equal `whole`, the length with the soft-prompt rows. If `whole` is None,
    an inner module has already removed the rows, so the output has at most `tokens` positions."""
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
    """Returns the output with `change` applied along each dimension of at least `whole` positions: in hidden states, in
    the queries of attention weights, and in tensors that have all tokens of a batch in one dimension (routers)."""
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
    """Returns the output with each cache replaced by `outward(cache)`."""
    return _mapped(output, lambda value: outward(value) if is_cache(value) else value)


def _mapped(output: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a container with `change` applied to its entries; other values unchanged."""
    if isinstance(output, Mapping):
        return type(output)(**{key: change(value) for key, value in output.items()})
    if isinstance(output, list | tuple):
        return type(output)(change(value) for value in output)
    return output
