"""Soft prompts that depend on the text after them. Their virtual tokens (rows) are computed for each text.

The text is the part of the input that `PromptPositions` returns. Its length is set by ``peftcore.call(model,
prompt_length=...)``; otherwise it is the tokens before the first label, or the whole input. The rows are computed in
the first forward. Forwards that continue from a cache do not compute them again, because the cache contains them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.authoring.prompts import REMEDY, PromptPositions
from peftcore.errors import MissingContext, SequenceError, UnsupportedSite
from peftcore.forward.context.context import forward_context
from peftcore.forward.context.taps import Tap
from peftcore.forward.sequence.sequence import SequenceOperator, states_of
from peftcore.forward.sequence.sequence_cache import Marked, self_attention_cache
from peftcore.roles.stacks import CACHES, EMBEDS, IDS, cache_in
from peftcore.targets.sequence_sites import FORM, SequenceSite


class InstanceOperator(SequenceOperator):
    """Base class of soft prompts that depend on the text after them. Subclasses define `rows_of`, and may define
    `tokens`, `look` and `learn`.

    Raises:
        UnsupportedSite: the stack reads the output of an encoder instead of the text.
    """

    def __init__(self, site: SequenceSite, length: int) -> None:
        if site.stack.reads:
            raise UnsupportedSite(
                f"{site.path} reads the output of an encoder instead of the text; target the encoder's stack"
            )
        super().__init__(site, length)
        generates = site.stack.causal and not site.stack.readers
        self._positions = PromptPositions(0, generates, 0, sys.maxsize, halves=False, whole=True)
        self._text = Tap()

    def rows_of(self, embeds: Tensor, text: Tensor) -> Tensor:
        """Returns the rows (virtual tokens) for a batch of embedded tokens ``[batch, tokens, width]``. They are
        ``[batch, length, width]``, or ``[length, width]`` if all sequences have the same. `text` is a mask ``[batch,
        tokens]`` of the tokens that belong to the text."""
        raise NotImplementedError

    def tokens(self, embeds: Tensor, text: Tensor) -> Tensor:
        """Returns new embeddings ``[batch, tokens, width]`` for the tokens after the rows; by default `embeds`. `text`
        is a mask ``[batch, tokens]`` of the tokens that belong to the text.
        """
        return embeds

    def look(self, call: Callable[..., Any], given: Mapping[str, Any], text: Tensor) -> None:
        """Compute something from the text before the rows are computed. For example, ``forward_context().without(self,
        call, **given)`` runs the stack on the text without this adapter. By default nothing is done.

        Args:
            call: the stack's forward.
            given: the arguments of the stack by name.
            text: a mask of the tokens that belong to the text, ``[batch, tokens]``.
        """

    def learn(self, states: Tensor, text: Tensor) -> None:
        """Add losses that depend on the stack's output, by ``forward_context().add_loss``. Called only in training. By
        default nothing is done.

        Args:
            states: the stack's output for the tokens after the rows, ``[batch, tokens, width]``.
            text: a mask of the tokens that belong to the text, ``[batch, tokens]``.
        """

    def rows(self, embeds: Tensor) -> Tensor:
        return self.rows_of(embeds, self._text_in(embeds))

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        act = super().at(form, module)
        return functools.partial(self._looking, act) if form == FORM else act

    def _looking(self, act: Callable[..., Any], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the stack. If this forward inserts the rows, find the text and call `look` first."""
        given = self._bind(FORM, args, kwargs)
        ids = given[IDS] if given.get(EMBEDS) is None else given[EMBEDS][..., 0]
        text = None
        if self._holds(cache_in(given)):
            if ids.shape[1] > 1 and forward_context().context.get("prompt_length") is None:
                raise MissingContext(f"this input continues a cache, and may or may not belong to the prompt: {REMEDY}")
        elif (text := self._find(given, ids)) is not None:
            self._text.put(text)
            self.look(call, given, text)
        try:
            output = act(call, *args, **kwargs)
        finally:
            self._text.take()
        if self.training and text is not None:
            self.learn(states_of(output)[:, -ids.shape[1] :], text)  # rows come first where a decoder reads them
        return output

    def _with_rows(self, embeds: Tensor) -> Tensor:
        return super()._with_rows(self.tokens(embeds, self._text_in(embeds)))

    def _text_in(self, embeds: Tensor) -> Tensor:
        """Returns the mask of the tokens that belong to the text. It is the mask that `_looking` has stored, or else
        all tokens."""
        text: Tensor | None = self._text.get()
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if text is None else text

    def _holds(self, cache: Any) -> bool:
        """Whether a cache already contains the rows."""
        own = None if cache is None else self_attention_cache(cache)
        return isinstance(own, Marked) and any(stamp == self.stamp for stamp, _ in own.rows)

    def _find(self, given: Mapping[str, Any], ids: Tensor) -> Tensor | None:
        """Returns the mask of the tokens that belong to the text. None for a single token in a compiled forward, which
        may be the first token or a later one.

        Raises:
            MissingContext: the input may be longer than the text, and the length of the text is unknown.
            SequenceError: the input is shorter than the text.
        """
        compiling = torch.compiler.is_compiling()  # numbers are tensors there, maybe
        told = 0 if compiling else _longest(forward_context().context.get("prompt_length"))
        if told > ids.shape[1]:
            raise SequenceError(
                f"the text has {told} tokens, but the first forward gets {ids.shape[1]} of them, and this method needs "
                "the whole text at once: prefill in one forward"
            )
        first = {name: value for name, value in given.items() if name not in CACHES}  # none holds anything
        found = self._positions.positions(ids[..., None], first, self.training)
        return None if found is None else found[1].expand(len(ids), -1)


def _longest(told: Any) -> int:
    """Returns the longest of the prompt lengths that the user passed. Returns 0 if there are none, or if they are on
    another device, where reading them would be slow."""
    if isinstance(told, Tensor):
        told = told.flatten().tolist() if told.device.type == "cpu" else None
    lengths = [told] if isinstance(told, int) else told or ()
    return max(map(int, lengths), default=0)
