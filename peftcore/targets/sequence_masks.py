"""Attention masks over a sequence that gets rows in front.

A two-dimensional mask marks padding; the stack makes its own from it, so columns of ones are enough. A four-dimensional
one is final: `generate` makes them for static caches, multimodal models for their images. It gets the rows' columns,
and the rows of those that enter with this forward, with the causality and the window of the layers that it is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import SequenceError
from peftcore.targets.sequence_cache import Opened

SLIDING = "sliding_attention"
KINDS = ("full_attention", SLIDING)
"""The kinds of attention for which transformers keeps masks apart, as far as these do not depend on absolute places."""
RECURRENT = ("linear_attention", "conv")
"""The kinds whose masks, [batch, queries], are for the tokens of this forward alone."""


@dataclass(frozen=True)
class Front:
    """The rows in front, with the sizes that the masks of one forward need."""

    module: nn.Module
    count: int
    enter: bool
    """Whether they enter with this forward; otherwise they are in the cache."""
    causal: bool
    cache: Opened

    def extend(self, mask: Any, queries: int) -> Any:
        """Returns the mask with the rows' columns; `queries` tokens come with this forward.

        Raises:
            SequenceError: a mask of a kind that cannot be extended.
        """
        if isinstance(mask, Mapping):
            return {kind: self._of_kind(kind, each, queries) for kind, each in mask.items()}
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return None if mask is None else self._padding(mask)
        return self._final(mask, self._slides_everywhere())

    def _padding(self, mask: Tensor) -> Tensor:
        return torch.cat([mask.new_ones(len(mask), self.count), mask], dim=1)

    def _of_kind(self, kind: str, mask: Any, queries: int) -> Any:
        if kind in RECURRENT:
            return self._padding(mask) if mask is not None and self.enter else mask
        if kind not in KINDS:
            raise SequenceError(f"masks for {kind} depend on absolute positions; pass the mask of [batch, length]")
        if mask is None:
            return self._built(queries + self.count) if kind == SLIDING and self.enter else None
        return self._padding(mask) if mask.dim() == 2 else self._final(mask, kind == SLIDING)

    def _built(self, queries: int) -> Tensor | None:
        """Returns a mask where none was given: that means that all before a token is in its window, which may end with
        rows in front."""
        window = self._window()
        if window is None or queries <= window or self._config()._attn_implementation != "sdpa":
            return None
        at = torch.arange(queries, device=next(self.module.parameters()).device)
        return _seen(at, at, window)[None, None]

    def _final(self, mask: Any, sliding: bool) -> Tensor:
        if not isinstance(mask, Tensor) or mask.dim() != 4 or not self.causal:
            shape = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
            raise SequenceError(
                f"a mask {shape} does not say here what rows in front are to see; pass one of [batch, length]"
            )
        entering = self.count if self.enter else 0
        queries, keys = mask.shape[-2] + entering, mask.shape[-1]
        length, offset = keys + self.count, 0
        if self.cache.inner is not None:
            length, offset = self.cache.sizes(queries, sliding)
        at = torch.arange(queries, device=mask.device) + self.cache.past
        rows = torch.arange(min(offset, self.count), self.count, device=mask.device)
        seen = _seen(at, rows, self._window() if sliding else None)
        none = torch.zeros(entering, keys, dtype=torch.bool, device=mask.device)
        below = torch.cat([_like(none, mask), mask], dim=-2)
        return torch.cat([_like(seen, mask), below], dim=-1)[..., :length]

    def _config(self) -> Any:
        config: Any = self.module.config
        return config.get_text_config()

    def _window(self) -> int | None:
        window: int | None = getattr(self._config(), "sliding_window", None)
        return window

    def _slides_everywhere(self) -> bool:
        """Whether one mask for all layers is for a window: the model has one and does not tell its layers apart."""
        return self._window() is not None and getattr(self._config(), "layer_types", None) is None


def _seen(at: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Returns [queries, keys]: whether queries at these places see the keys, before them and in the window."""
    seen = keys <= at[:, None]
    return seen if window is None else seen & (at[:, None] - keys < window)


def _like(seen: Tensor, mask: Tensor) -> Tensor:
    """Returns [queries, keys] as [batch, heads, queries, keys] in the form of the mask: True where seen, or 0 and the
    lowest."""
    if mask.dtype != torch.bool:
        seen = mask.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(mask.dtype).min)
    return seen.expand(*mask.shape[:2], *seen.shape)
