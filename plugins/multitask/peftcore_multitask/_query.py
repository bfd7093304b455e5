"""A decision about each text, made of its embedded tokens before the blocks run, and kept while the text is continued.

`PromptPositions` defines the text: the part before the first label, or the whole input, unless ``peftcore.call(model,
prompt_length=...)`` gives its length. Forwards that go on from a cache find the decision with the cache: copies of it
have it too, and rows that are repeated (beams) repeat it.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from peftcore.author import (
    PromptPositions,
    Router,
    Site,
    Surgeon,
    Tap,
    TokenStack,
    TokenStacks,
    cache_in,
    cached_tokens,
)
from peftcore.author import forward_context as running
from peftcore.errors import MissingContext, SequenceError

EMBEDS = "inputs_embeds"
KEPT = "_peftcore_decided"
"""The attribute of a cache in which decisions are kept."""


class Decisions:
    """The decisions of one operator, kept with the model's caches; copies of the model share them."""

    def __init__(self) -> None:
        self.stamp = uuid.uuid4().hex

    def of(self, cache: Any) -> Tensor | None:
        """Return what was decided when the text in a cache was new."""
        kept: Tensor | None = getattr(cache, KEPT, {}).get(self.stamp)
        return kept

    def keep(self, cache: Any, decided: Tensor) -> None:
        """Keep a decision with a cache; one that takes no attributes keeps nothing."""
        with suppress(AttributeError):
            setattr(cache, KEPT, {**getattr(cache, KEPT, {}), self.stamp: decided.detach()})


class DecidingOperator(Router):
    """Acts around a stack and behind its token table, and leaves what `decide` says of each text, ``[rows, ...]``."""

    routes = "sequence"
    observes = frozenset({"table"})

    def __init__(self, site: Site, stack: TokenStack, decided: Tap) -> None:
        super().__init__(site)
        self.decided, self.given, self.kept, self.names = decided, Tap(), Decisions(), site.arguments
        self.positions = PromptPositions(0, stack.causal, 0, sys.maxsize, halves=False, whole=True)

    def decide(self, embeds: Tensor, text: Tensor) -> Tensor:
        """Return the decision for embedded tokens ``[rows, tokens, d]``, of which `text` ``[rows, tokens]`` counts."""
        raise NotImplementedError

    def at(self, form: str, module: Any) -> Callable[..., Any]:
        return self._at_table if form == "table" else self

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.given.put(given)
        if given.get(EMBEDS) is not None:
            self._leave(given[EMBEDS])
        output = call(*args, **kwargs)
        cache = cache_in(output) if isinstance(output, Mapping) else None
        cache = cache_in(given) if cache is None else cache
        if cache is not None:
            self.kept.keep(cache, self.decided.get())
        return output

    def _at_table(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        embeds = call(*args, **kwargs)
        self._leave(embeds)
        return embeds

    def _leave(self, embeds: Tensor) -> None:
        given = self.given.take()
        if given is None:  # the table is used elsewhere
            return
        if cached_tokens(given, 0, embeds.shape[1]):
            self.decided.put(self._again(self.kept.of(cache_in(given)), embeds))
            return
        found = self.positions.positions(embeds, given, self.training)
        assert found is not None, "nothing is in a cache"
        self.decided.put(self.decide(embeds, found[1].expand(embeds.shape[:2])))

    def _again(self, kept: Tensor | None, embeds: Tensor) -> Tensor:
        """Return what was decided when the text was new; raises where it was not, or where the input may be more of
        it."""
        if kept is None or len(embeds) % len(kept):
            raise SequenceError(
                "this cache was filled without this adapter, or for other rows: start with an empty cache, and leave "
                "the adapter active while it fills"
            )
        if embeds.shape[1] > 1 and running().context.get("prompt_length") is None:
            raise MissingContext(
                "this input goes on from a cache, and may be more of the text or not: say where the text ends, with "
                "peftcore.call(model, prompt_length=...): ..."
            )
        return kept.repeat_interleave(len(embeds) // len(kept), 0)


def deciding_place(surgeon: Surgeon, sites: list[Site]) -> tuple[Site, TokenStack, tuple[Site, ...]]:
    """Return the place around the one stack of some modules, the stack, and the place of its token table.

    Raises:
        UnsupportedSite: the modules lack one stack, or it is an encoder or decoder connected to another stack.
    """
    place, stack = TokenStacks(surgeon).around(sites), TokenStacks(surgeon).of(sites[0])
    assert stack is not None, "there is a place around it"
    table = surgeon.resolver.site(f"{stack.path}.{stack.table}".lstrip("."), "weight")
    return place, stack, (replace(table, form="table"),)
