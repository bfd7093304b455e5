"""Mutants of the checks of calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mutant_base import TAGS, Entry, Small, mutant
from torch import Tensor

from peftcore.author import forward_context
from peftcore.forward.state.host_state import state_of


class DoublesUnderRoutes(Small):
    """Twice the update where rows are routed."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = super().forward(call, x)
        choice = forward_context().choice
        return 2 * y - call(x) if choice is not None and choice.route is not None else y


class RunsItsModuleTwiceUnderRoutes(Small):
    """Throws away what the module returns for other inputs, where rows are routed."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        choice = forward_context().choice
        if choice is not None and choice.route is not None:
            call(x.clone())
        return super().forward(call, x)


class ReadsTheRoute(Small):
    """Needs the values of the route."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        choice = forward_context().choice
        y = super().forward(call, x)
        if choice is not None and choice.route is not None and choice.route.index[0] == 0:
            return y.clone()
        return y


class AsksTheHost(Small):
    """Doubles where another injection is the active one of the host."""

    state: Any = None

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = super().forward(call, x)
        return 2 * y - call(x) if self.state is not None and self.state.choice.active == ("one",) else y


def _with_state(self: Any, model: Any, config: Any, injection: Any) -> None:
    for parameter in injection.parameters():
        parameter.requires_grad_(True)
    if injection.name == "two":
        for operator in injection.operators.values():
            operator.__dict__["state"] = state_of(model)


class CountsTokens(Small):
    """Doubles a token that comes alone, where no padding is."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = super().forward(call, x)
        padded = forward_context().inputs.get("attention_mask") is not None
        return 2 * y - call(x) if x.dim() == 3 and x.shape[1] == 1 and not padded else y


class CountsBeams(Small):
    """Doubles a token that comes alone in each of four rows."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = super().forward(call, x)
        return 2 * y - call(x) if x.shape[:2] == (4, 1) else y


MUTANTS: dict[str, Entry] = {
    "routed_rows_equal_separate_passes": (mutant("doubles_under_routes", DoublesUnderRoutes), "llama"),
    "each_pays_for_its_own_rows": (mutant("runs_twice_under_routes", RunsItsModuleTwiceUnderRoutes), "llama"),
    "routing_is_refused_where_rows_mix": (mutant("too_modest", tags=replace(TAGS, per_row=False)), "llama"),
    "backward_repeats_the_choice_of_its_forward": (
        mutant("asks_the_host", AsksTheHost, trainable=_with_state),
        "llama",
    ),
    "assignments_share_a_compiled_graph": (mutant("reads_the_route", ReadsTheRoute), "llama"),
    "generation_does_not_depend_on_the_cache": (mutant("counts_tokens", CountsTokens), "llama"),
    "generation_in_other_ways_does_not_depend_on_the_cache": (mutant("counts_beams", CountsBeams), "llama"),
}
