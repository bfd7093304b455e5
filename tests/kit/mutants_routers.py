"""Mutants of the checks of routers, and of draws that backward repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from mutant_base import NOT_MERGEABLE, TAGS, Entry, Small, mutant
from torch import Tensor

from peftcore.author import MethodConfig, Router, Site, forward_context


class RoutesWithoutATag(Router, Small):
    """Notes gates, of which the tags say nothing."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return Small.forward(self, call, x)


class NotesTheFirstTokenAlone(Router, Small):
    """Weighs the ranks of each token, and tells the gates of the first ones."""

    merged = Router.merged

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        gates = torch.softmax(low := self.layer.apply(x, A), self.layer.channel_dim)
        self.noted(gates[:, :1], self.layer.channel_dim)
        return self.layer.add(y, low * gates, B, 1.0)


class ForgetsItsDraws(Small):
    """Keeps a part of the update at random, and all of it where backward repeats the forward."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.noise = 1.0

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        low = self.layer.apply(x, A)
        if self.training and self.noise:
            drawn = torch.rand_like(low)
            low = low * (torch.ones_like(low) if forward_context().repeating else drawn)
        return self.layer.add(y, low, B, 1.0)


MUTANTS: dict[str, Entry] = {
    "draws_are_those_of_the_forward": (
        mutant("forgets_its_draws", ForgetsItsDraws, tags=replace(TAGS, random=True)),
        "llama",
    ),
    "routers_are_declared": (mutant("routes_without_a_tag", RoutesWithoutATag, tags=TAGS), "llama"),
    "reports_count_tokens": (
        mutant("notes_the_first_token", NotesTheFirstTokenAlone, tags=replace(NOT_MERGEABLE, routes="token")),
        "llama",
    ),
}
