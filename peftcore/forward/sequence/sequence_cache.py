"""Caches of transformers that contain, besides the user's tokens, the rows that a sequence edit (a soft prompt)
inserted before them.

Inside the stack (the module with the blocks) the cache counts rows and tokens, so masks, positions and windows are
those of one long sequence. Outside, `generate` slices ids by the length of the cache and makes masks of that length, so
there the cache must count only the user's tokens. For this reason the class of the user's cache is changed to a
*marked* subclass, whose counts exclude the rows. The stack gets a plain cache that shares its layers. The mark records
the prompt whose rows the cache contains. If a cache was filled without the rows, or with another prompt, an error is
raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftcore.errors import SequenceError
from peftcore.forward.sequence.sequence_order import Order

Rows = tuple[tuple[str, Order], ...]
"""The edits whose rows a cache contains, the outermost last: (stamp of the operator, positions of the soft-prompt
rows)."""


class Marked:
    """Mixin for caches that contain soft-prompt rows: all counts exclude these rows. It is placed before the cache
    class."""

    unmarked: type[Any]
    """The class of the cache without the mark."""
    layers: list[Any]
    rows: Rows
    grown = 0
    """The number of positions added to the capacity of static layers."""

    @property
    def _front(self) -> int:
        return sum(order.count for _, order in self.rows)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx) - self._front  # type: ignore[misc]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
        return length - max(self._front - offset, 0), max(offset - self._front, 0)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        if layer_idx is None:
            return max(map(self.get_max_length, range(len(self.layers))), default=-1)
        length: int = super().get_max_length(layer_idx)  # type: ignore[misc]
        return length - self.grown if _grows(self.layers[layer_idx]) else length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._follow(lambda before: before[beam_idx.to(before.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._follow(lambda before: before[indices.to(before.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._follow(lambda before: before.repeat_interleave(repeats))

    def _follow(self, change: Callable[[Tensor], Tensor]) -> None:
        """Update the positions of the soft-prompt rows after the sequences of the cache were reordered, selected or
        repeated."""
        self.rows = tuple((stamp, order.changed(change)) for stamp, order in self.rows)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise SequenceError(
            f"this cache begins with {self._front} rows of soft prompts that are not active now: activate the adapters "
            "that filled it, or pass an empty cache"
        )

    def reset(self) -> None:
        """Empty the cache and restore its original class."""
        super().reset()  # type: ignore[misc]
        if self.grown:
            _grow(self, -self.grown)
        self.__class__ = self.unmarked
        self.__dict__.pop("rows")
        self.__dict__.pop("grown", None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.unmarked,), self.__dict__


_CLASSES: dict[type, type[Any]] = {}


def _marked_class(base: type) -> type[Any]:
    if base not in _CLASSES:
        _CLASSES[base] = type(base.__name__, (Marked, base), {"unmarked": base, "__module__": base.__module__})
    return _CLASSES[base]


def _rebuild(base: type[Any]) -> Any:
    cls = _marked_class(base)
    return object.__new__(cls)


def _view(own: Any, rows: Rows) -> Any:
    """Returns another cache with the same layers, whose counts exclude `rows`."""
    base: Any = own.unmarked if isinstance(own, Marked) else type(own)
    view: Any = object.__new__(_marked_class(base) if rows else base)
    view.__dict__.update(own.__dict__)
    view.__dict__["rows"] = rows
    return view


def _rows(own: Any) -> Rows:
    """Returns the edits whose rows a cache contains."""
    return own.rows if isinstance(own, Marked) else ()


def self_attention_cache(cache: Any) -> Any:
    """Returns the cache for a stack's own tokens. For a decoder that also attends to an encoder, this is a part of the
    given cache; otherwise it is the given cache.

    Raises:
        SequenceError: the object is not a cache of transformers.
    """
    from transformers.cache_utils import Cache, EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache
    if not isinstance(cache, Cache):
        raise SequenceError(
            f"{type(cache).__name__} is not a cache of transformers: pass one, such as transformers.DynamicCache()"
        )
    return cache


def _with_own(cache: Any, own: Any) -> Any:
    if self_attention_cache(cache) is cache:
        return own
    other: Any = object.__new__(type(cache))
    other.__dict__.update(cache.__dict__, self_attention_cache=own)
    return other


def _grows(layer: Any) -> bool:
    """Whether a layer of a cache has a fixed capacity for all tokens, and not only for a window."""
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    if isinstance(layer, StaticSlidingWindowLayer):  # mixtures say what their other parent can
        return bool(StaticSlidingWindowLayer.is_croppable.__get__(layer))
    return isinstance(layer, StaticLayer)


def _grow(own: Any, count: int) -> None:
    """Increase the capacity of empty static layers by `count`. The next update allocates them again."""
    for layer in filter(_grows, own.layers):
        layer.max_cache_len += count
        layer.is_initialized = False


def is_filled(cache: Any) -> bool:
    """Whether a cache contains tokens or states."""
    own = self_attention_cache(cache)
    if own.layers and all(own.is_linear):
        return bool(own.has_previous_state())
    return int(own.get_seq_length()) > 0


@dataclass(frozen=True, eq=False)
class SequenceCacheView:
    """A cache in one forward, as one sequence edit (a soft prompt) uses it."""

    given: Any
    """The cache that the edit (an operator that inserts rows) receives: from the user, or from another edit around this
    one. None if the cache is still to be created."""
    inner: Any
    """The cache that the stack of blocks receives. It counts the soft-prompt rows of this edit (an operator that
    inserts rows) too."""
    held: bool
    """Whether the soft-prompt rows are in the cache already; otherwise this forward adds them."""

    @property
    def order(self) -> Order:
        """The positions of the soft-prompt rows in the cache."""
        return _rows(self_attention_cache(self.given))[-1][1]

    def counts_places(self, positions: Tensor | None) -> bool:
        """Whether masked positions between two tokens change the result. They do if the stack of blocks has windows or
        recurrent layers, or if `positions` is None."""
        own = self_attention_cache(self.inner)
        return positions is None or any(own.is_sliding) or any(own.is_linear)

    @property
    def past(self) -> Any:
        """The number of tokens in the cache, including the soft-prompt rows of this edit (an operator that inserts
        rows). It is an int, or a tensor for static caches."""
        return 0 if self.inner is None else self_attention_cache(self.inner).get_seq_length()

    def sizes(self, queries: int, sliding: bool) -> tuple[int, int]:
        """Returns the number of keys that the next queries see, and the position of the first key. `sliding` selects
        the layers with windows."""
        own = self_attention_cache(self.inner)
        index = next((index for index, each in enumerate(own.is_sliding) if each == sliding), 0)
        length, offset = own.get_mask_sizes(queries, index)
        return length, offset

    def mark(self, mark: tuple[str, Order]) -> None:
        """Mark the user's cache, after the forward has filled it with the soft-prompt rows."""
        if self.given is None or self.held or not is_filled(self.inner):
            return
        own, inner = self_attention_cache(self.given), self_attention_cache(self.inner)
        own.__dict__.update(rows=(*_rows(inner), mark), grown=inner.__dict__.get("grown", 0))
        own.__class__ = _marked_class(type(own))

    def abandon(self, count: int) -> None:
        """Remove the capacity that was added for the soft-prompt rows, if a forward failed before it filled the
        cache."""
        grew = self.given is not None and not self.held and "grown" in self_attention_cache(self.inner).__dict__
        if grew and not is_filled(self.given):
            _grow(self_attention_cache(self.given), -count)

    def outward(self, found: Any, mark: tuple[str, Order]) -> Any:
        """Returns the cache to return to the user in place of `found`, a cache in the output of the transformer blocks.
        It is the cache that the user passed. If the user passed none, it is a new one that contains `mark`."""
        if found is self.inner:
            return self.given
        own = self_attention_cache(found)
        if self.given is None:
            return _with_own(found, _view(own, (*_rows(own), mark)))
        return _with_own(found, self_attention_cache(self.given)) if own is self_attention_cache(self.inner) else found


def opened(cache: Any, stamp: str, count: int) -> SequenceCacheView:
    """Returns the `SequenceCacheView` of a cache, for an operator that inserts soft-prompt rows.

    Args:
        cache: the cache that the user passed, or None.
        stamp: the identity of the operator.
        count: the number of its rows.

    Raises:
        SequenceError: the cache was filled without the rows of this operator, or with other rows.
    """
    if cache is None:
        return SequenceCacheView(None, None, held=False)
    own = self_attention_cache(cache)
    if isinstance(own, Marked):
        filler, order = own.rows[-1]
        if (filler, order.count) != (stamp, count):
            raise SequenceError(
                f"this cache was filled with {order.count} rows of another soft prompt than the active one: activate "
                "the adapter that filled it, or pass an empty cache"
            )
        return SequenceCacheView(cache, _with_own(cache, _view(own, own.rows[:-1])), held=True)
    if is_filled(cache):
        raise SequenceError(
            "this cache was filled without the active soft prompt, which has to come first: pass an empty cache, or "
            "disable the adapter"
        )
    inner = _view(own, ())
    if any(map(_grows, own.layers)):
        _grow(own, count)
        inner.grown = own.__dict__.get("grown", 0) + count  # an outer edit may have added some, too
    return SequenceCacheView(cache, _with_own(cache, inner), held=False)
