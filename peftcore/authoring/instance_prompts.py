"""Soft prompts that depend on the text after them: they are computed for each text, or they change its embeddings.

`PromptPositions` finds the text: the tokens before the first label, or the whole input, unless ``peftcore.call(model,
prompt_length=...)`` sets its length. The text is read once, by the forward that inserts the rows; forwards that
continue from a cache find the rows there.
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
    """Base class of soft prompts that depend on the text. Subclasses define `rows_of`, and may define `tokens`, `look`
    and `learn`.

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
        """Returns the rows for a batch of embedded tokens ``[batch, tokens, width]``: ``[length, width]`` for all
        sequences, or ``[batch, length, width]``. `text` is a mask of the tokens that belong to the text, ``[batch,
        tokens]``."""
        raise NotImplementedError

    def tokens(self, embeds: Tensor, text: Tensor) -> Tensor:
        """Returns the tensor that replaces the embedded tokens ``[batch, tokens, width]``; by default the embedded
        tokens.
        """
        return embeds

    def look(self, call: Callable[..., Any], given: Mapping[str, Any], text: Tensor) -> None:
        """Read the text before the rows are computed: for example by the stack's own pass over the text,
        ``forward_context().without(self, call, **given)``. By default nothing is done.

        Args:
            call: the stack's forward.
            given: its arguments by name.
            text: a mask of the tokens that belong to the text, ``[batch, tokens]``.
        """

    def learn(self, states: Tensor, text: Tensor) -> None:
        """Add losses on the stack's output for the tokens after the rows, by ``forward_context().add_loss``. Called in
        training only. By default nothing is done.

        Args:
            states: the stack's output for the tokens, ``[batch, tokens, width]``.
            text: a mask of the tokens that belong to the text, ``[batch, tokens]``.
        """

    def rows(self, embeds: Tensor) -> Tensor:
        return self.rows_of(embeds, self._text_in(embeds))

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        act = super().at(form, module)
        return functools.partial(self._looking, act) if form == FORM else act

    def _looking(self, act: Callable[..., Any], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the stack, and look at the text before, where the rows enter."""
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
        """Returns which tokens are of the text: all of them where nobody told more."""
        text: Tensor | None = self._text.get()
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if text is None else text

    def _holds(self, cache: Any) -> bool:
        """Whether a cache has the rows already."""
        own = None if cache is None else self_attention_cache(cache)
        return isinstance(own, Marked) and any(stamp == self.stamp for stamp, _ in own.rows)

    def _find(self, given: Mapping[str, Any], ids: Tensor) -> Tensor | None:
        """Returns which tokens are of the text; None where it is a single token, of which a compiled forward cannot
        tell whether it is the first.

        Raises:
            MissingContext: the input may be more than the text, and nobody said where that ends.
            SequenceError: it is less.
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
    """Returns the longest of the lengths that a call was told; 0 where it would have to be waited for."""
    if isinstance(told, Tensor):
        told = told.flatten().tolist() if told.device.type == "cpu" else None
    lengths = [told] if isinstance(told, int) else told or ()
    return max(map(int, lengths), default=0)
