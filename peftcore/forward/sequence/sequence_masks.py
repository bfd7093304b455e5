"""Attention masks over a sequence with the rows of a soft prompt.

A mask shows how much padding a sequence has on the left, and therefore the position of the rows. A two-dimensional mask
marks padding. The model computes its attention mask from it, so columns of ones are enough for the rows. A
four-dimensional mask is passed to the layers directly: `generate` makes it for static caches, multimodal models for
their images. So it is extended here. It gets a key column for each row. If this forward inserts the rows, it also gets
a query for each row. Both follow the causality and the window of the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import SequenceError
from peftcore.forward.sequence.sequence_cache import SequenceCacheView
from peftcore.forward.sequence.sequence_order import Order

SLIDING = "sliding_attention"
KINDS = ("full_attention", SLIDING)
"""The kinds of attention for which transformers makes separate masks. Kinds whose masks depend on absolute positions
are excluded."""
RECURRENT = ("linear_attention", "conv")
"""The kinds of layers whose masks ``[batch, queries]`` cover only the tokens of this forward."""


def padding_before(mask: Any, batch: int, tokens: int) -> Tensor | None:
    """Returns the number of masked positions at the start of each sequence, ``[batch]``; None if the mask does not
    determine it.

    If a sequence is only padding, its last position counts as a token.

    Args:
        mask: the host's mask ``[batch, keys]`` or ``[batch, heads, queries, keys]``, or a mapping of masks.
        batch: the number of sequences in the forward that inserts the soft-prompt rows.
        tokens: the number of tokens in that forward.
    """
    if isinstance(mask, Mapping):
        told = (padding_before(each, batch, tokens) for each in mask.values())
        return next((before for before in told if before is not None), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    return hidden_before(mask).clamp(max=tokens - 1).expand(batch)


def hidden_before(mask: Tensor) -> Tensor:
    """Returns the number of masked columns at the start of each sequence of a mask, ``[batch]``."""
    seen = mask != 0
    if mask.dim() == 4:
        seen = (mask if mask.dtype == torch.bool else mask.float().exp() > 0).any(dim=2).any(dim=1)
    return (seen.cumsum(-1) == 0).sum(-1)


@dataclass(frozen=True)
class Front:
    """Extends the masks of one forward for the rows of a soft prompt."""

    module: nn.Module
    order: Order
    """The positions of the soft-prompt rows."""
    enter: bool
    """Whether this forward inserts the soft-prompt rows; otherwise the cache contains them."""
    causal: bool
    cache: SequenceCacheView

    def extend(self, mask: Any, queries: int) -> Any:
        """Returns the mask with columns for the soft-prompt rows; `queries` is the number of tokens in this forward.

        Raises:
            SequenceError: the mask is of a kind that cannot be extended.
        """
        if isinstance(mask, Mapping):
            return {kind: self._of_kind(kind, each, queries) for kind, each in mask.items()}
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return None if mask is None else self._padding(mask)
        return self._final(mask, self._slides_everywhere())

    @property
    def count(self) -> int:
        return self.order.count

    def refuse_late_padding(self, mask: Any, queries: int) -> None:
        """Raise an error if padding follows the soft-prompt rows. This can happen if a prompt is prefilled in chunks:
        the first chunk of a short sequence is only padding, and the next chunk begins with more padding.

        Raises:
            SequenceError: a sequence has padding after the rows.
        """
        for kind, each in mask.items() if isinstance(mask, Mapping) else [("", mask)]:
            if not isinstance(each, Tensor) or kind in RECURRENT:
                continue
            first = 0
            if each.dim() == 4:
                sliding = kind == SLIDING or (not kind and self._slides_everywhere())
                first = max(self.cache.sizes(queries, sliding)[1] - self.count, 0)
            elif each.shape[1] != self.order.tokens + queries:
                continue
            if first < self.order.tokens and bool((hidden_before(each) + first > self.order.tokens).any()):
                raise SequenceError(
                    f"a sequence begins with more padding than the {self.order.tokens} tokens of the forward that "
                    "added the soft prompt, so padding would follow the prompt: prefill in chunks that are longer than "
                    "the padding"
                )

    def _padding(self, mask: Tensor) -> Tensor:
        whole, before = torch.cat([mask.new_ones(len(mask), self.count), mask], dim=1), self.order.before
        if before is None:
            return whole
        at, before = torch.arange(whole.shape[1], device=mask.device), before.to(mask.device)[:, None]
        return torch.where(at < before + self.count, (at >= before).to(mask.dtype), whole)

    def _of_kind(self, kind: str, mask: Any, queries: int) -> Any:
        if kind in RECURRENT:
            return self._padding(mask) if mask is not None and self.enter else mask
        if kind not in KINDS:
            raise SequenceError(
                f"attention masks for {kind} depend on absolute positions: pass a mask of shape [batch, length]"
            )
        if mask is None:
            return self._built(queries + self.count) if kind == SLIDING and self.enter else None
        return self._padding(mask) if mask.dim() == 2 else self._final(mask, kind == SLIDING)

    def _built(self, queries: int) -> Tensor | None:
        """Returns a mask for layers with a window if the forward has none. Without a mask, each token sees all earlier
        tokens. With added rows these may exceed the window."""
        window = self._window()
        if window is None or queries <= window or self._config()._attn_implementation != "sdpa":
            return None
        at = torch.arange(queries, device=next(self.module.parameters()).device)
        return _seen(at, at, window)[None, None]

    def _final(self, mask: Any, sliding: bool) -> Tensor:
        if not isinstance(mask, Tensor) or mask.dim() != 4 or not self.causal:
            shape = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
            raise SequenceError(
                f"a mask {shape} does not say what the rows in front may see: pass a mask of shape [batch, length]"
            )
        queries, keys = mask.shape[-2] + (self.count if self.enter else 0), mask.shape[-1]
        length, offset = keys + self.count, 0
        if self.cache.inner is not None:
            length, offset = self.cache.sizes(queries, sliding)
        if keys < length - max(self.count - offset, 0):
            raise SequenceError(
                f"the mask has {keys} keys, but with {self.count} rows in front there are {length}: pass a mask of "
                "shape [batch, length] for all tokens, including those in the cache"
            )
        at, to = (torch.arange(size, device=mask.device) for size in (queries, length))
        at, to = at + self.cache.past, to + offset
        asking, asked = self.order.origin(at), self.order.origin(to)
        columns = asked - self.count - max(offset - self.count, 0)  # of the mask, which leaves the rows out
        whole = torch.take_along_dim(mask, columns.clamp(0, keys - 1)[:, None, None], -1)
        if self.enter:
            whole = torch.take_along_dim(whole, (asking - self.count).clamp(min=0)[:, None, :, None], -2)
        of_rows = (asked < self.count)[:, None, None]
        seen = _seen(at, to, self._window() if sliding else None) & of_rows
        return torch.where(of_rows | (asking < self.count)[:, None, :, None], _like(seen, mask), whole)

    def _config(self) -> Any:
        config: Any = self.module.config
        return config.get_text_config()

    def _window(self) -> int | None:
        window: int | None = getattr(self._config(), "sliding_window", None)
        return window

    def _slides_everywhere(self) -> bool:
        """Whether a single mask belongs to layers with a window: the model has a window, and all its layers have the
        same kind of attention."""
        return self._window() is not None and getattr(self._config(), "layer_types", None) is None


def _seen(at: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Returns ``[queries, keys]`` of bool, given the positions of queries and keys: True for keys at or before the
    query, and inside the window."""
    seen = keys <= at[:, None]
    return seen if window is None else seen & (at[:, None] - keys < window)


def _like(seen: Tensor, mask: Tensor) -> Tensor:
    """Returns the boolean mask `seen` in the format of `mask`: boolean, or 0 for visible and the lowest value for
    hidden."""
    if mask.dtype == torch.bool:
        return seen
    return torch.where(seen, mask.new_zeros(()), mask.new_full((), torch.finfo(mask.dtype).min))
