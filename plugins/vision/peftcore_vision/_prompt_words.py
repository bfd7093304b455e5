"""Base operator of trained context vectors, which replace words of a text. It finds the positions of these words.

The user's texts contain one placeholder word of one token for each context vector. By default the placeholders are the
tokens right after the first token. With the option `placeholder` they are all tokens with this id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from peftcore.author import MethodConfig, Operator, Site, Surgeon, Tap
from peftcore.errors import ConfigError, SequenceError, UnsupportedSite

TOWER = "tower"
"""The form of a site at a text encoder (tower), where the operator reads the attention mask."""


class PlacesConfig(MethodConfig):
    """Options of trained context vectors."""

    length: PositiveInt = 16
    """Number M of context vectors."""
    init_ids: list[NonNegativeInt] = Field(default_factory=list)
    """Token ids. The embedding of each id initializes one context vector."""
    placeholder: NonNegativeInt | None = None
    """Id of the placeholder token, whose occurrences the vectors replace from left to right. None: the vectors replace
    the tokens right after the first token."""

    @property
    def count(self) -> int:
        """Return the number of vectors of a context."""
        return len(self.init_ids) or self.length


class PlacesOperator(Operator):
    """Finds the positions of context vectors among the embedded tokens."""

    observes = frozenset({TOWER})

    def __init__(self, site: Site, config: PlacesConfig, names: tuple[str, ...] = ()) -> None:
        super().__init__(site)
        self.names = names  # of the tower's arguments
        self.placeholder, self.count = config.placeholder, config.count
        self.mask = Tap()  # from the tower to its embeddings

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._note if form == TOWER else super().at(form, module)

    def _note(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.mask.put({**dict(zip(self.names, args, strict=False)), **kwargs}.get("attention_mask"))
        try:
            return call(*args, **kwargs)
        finally:
            self.mask.take()

    def held(self, ids: Tensor) -> Tensor:
        """Return a mask [batch, tokens] that is True at the positions of the context.

        Raises:
            SequenceError: a text does not have one position for each vector.
        """
        count = self.count
        if self.placeholder is None:
            at, mask = torch.arange(ids.shape[-1], device=ids.device), self.mask.get()
            if isinstance(mask, Tensor) and mask.shape == ids.shape:
                at = at - (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # places behind the padding on the left
            held, enough = ((at >= 1) & (at <= count)).expand_as(ids), ids.shape[-1] > count
        else:
            held = ids == self.placeholder
            enough = torch.compiler.is_compiling() or bool((held.sum(-1) == count).all())
        if not enough:
            raise SequenceError(
                f"texts of {ids.shape[-1]} tokens do not have {count} positions for the context: tokenize the texts "
                "together with the context's placeholder words"
            )
        return held


def put_at(held: Tensor, context: Tensor, states: Tensor) -> Tensor:
    """Return states [batch, tokens, d] in which vectors [batch or 1, M, d] replace the positions where `held` is
    True."""
    number = (held.cumsum(-1) - 1).clamp(0, context.shape[1] - 1)  # which of the vectors a place gets
    chosen = context.expand(len(states), -1, -1).gather(1, number[..., None].expand_as(states))
    return torch.where(held[..., None], chosen, states)


def words(site: Site, config: PlacesConfig, contexts: int = 1) -> Tensor:
    """Return initial context vectors [contexts, M, d] for a token embedding: draws from N(0, 0.02), or the embeddings
    of the tokens in `init_ids`.

    Raises:
        ConfigError: an id in `init_ids` is outside of the vocabulary.
    """
    start = torch.randn(contexts, config.count, site.out_features) * 0.02
    if not config.init_ids:
        return start
    if max(config.init_ids) >= site.in_features:
        raise ConfigError(
            f"init_ids= has the id {max(config.init_ids)}, outside of the vocabulary of {site.in_features} tokens"
        )
    return site.weight().detach()[:, config.init_ids].T.to(start).expand_as(start).clone()


def text_sites(surgeon: Surgeon) -> Iterator[tuple[Site, Site]]:
    """Yield each target that is the token embedding of a text encoder, together with the site of this encoder.

    Raises:
        UnsupportedSite: the model lacks such an embedding, or a target is another module.
    """
    stacks = {f"{each.path}.{each.table}".lstrip("."): each for each in surgeon.resolver.token_stacks()}
    sites, refused = [], []
    for site in surgeon.sites():
        stack = stacks.get(site.module_path)
        if stack is None:
            refused.append(f"{site.path} is not the token table of a text tower; target that table")
        elif stack.causal and stack.takes_cache:
            refused.append(f"{site.path} embeds the tokens of a generating model; use prompt_tuning for it")
        else:
            sites.append(site)
    if refused and (surgeon.wishes.target is not None or not sites):
        raise UnsupportedSite(refused[0])
    for site in sites:
        path = stacks[site.module_path].path
        tower = replace(site, module=surgeon.resolver.modules[path], module_path=path, form=TOWER)
        yield replace(site, form="activation"), tower
