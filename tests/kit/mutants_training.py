"""For each check of what methods do round training (data, steps, losses) a method that fails it, and it only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from mutant_base import NOT_MERGEABLE, TAGS, Entry, Small, Unmergeable, mutant
from torch import Tensor, nn

from peftcore import Injection
from peftcore.author import Batches, Method, MethodConfig, Site, Tap
from peftcore.contract.surgeon_protocol import Surgeon

WITH_DATA = replace(TAGS, needs_data=True)
SCHEDULED = replace(TAGS, scheduled=True)


def looks_and_forgets(self: Method, model: nn.Module, data: Batches, config: Any, injection: Injection) -> None:
    for batch in data:
        batch.loss()


class Sees(Small):
    """A buffer for what data says."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.register_buffer("seen", torch.zeros(()))


def graft_seeing(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    for site in surgeon.sites():
        surgeon.graft(site, Sees, config)


def marks_the_host(self: Method, model: nn.Module, data: Batches, config: Any, injection: Injection) -> None:
    """Keeps the mean loss, and a mark on the host that it takes away when all goes well."""
    model.__dict__["marked"] = True
    losses = [batch.loss().detach() for batch in data]
    for operator in injection.operators.values():
        if isinstance(operator, Sees):
            operator.get_buffer("seen").copy_(sum(losses))
    del model.__dict__["marked"]


def does_nothing(self: Method, injection: Injection, step: int, total: int) -> None:
    pass


def adds_a_vector(self: Method, injection: Injection) -> Tensor:
    return torch.cat([operator.get_parameter("A").flatten() for operator in injection.operators.values()])


KEPT: WeakKeyDictionary[Injection, Tensor] = WeakKeyDictionary()


def keeps_its_loss(self: Method, injection: Injection) -> Tensor:
    """Computes it in the first step alone."""
    if injection not in KEPT:
        KEPT[injection] = adds_a_vector(self, injection).square().mean()
    return KEPT[injection]


def all_of_them(self: Method, injection: Injection, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
    return [{"params": list(injection.parameters()), "lr": lr, **defaults}]


def hardly_moves(self: Method, injection: Injection, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
    trained = [parameter for parameter in injection.parameters() if parameter.requires_grad]
    return [{"params": trained, "lr": lr * 1e-4, **defaults}]


class Counts(Small):
    """Counts its steps in a plain attribute."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.steps = 0


def grows(self: Method, injection: Injection, step: int, total: int) -> None:
    for operator in injection.operators.values():
        if isinstance(operator, Counts):
            operator.steps += 1
            operator.A.mul_(1 + 0.01 * operator.steps)


class Grows(Small):
    """Has its scale in a plain attribute."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.scale = 1.0

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(x, A), B, self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A.flatten(1)).view(weight.shape)


def scales(self: Method, injection: Injection, step: int, total: int) -> None:
    for operator in injection.operators.values():
        if isinstance(operator, Grows):
            operator.scale *= 1.1
            operator.A.mul_(1.001)


class ReadsTheOneBefore(Unmergeable):
    """Adds to its update what the operator before it left, which is gone when its block runs again."""

    def __init__(self, site: Site, config: MethodConfig, before: Tap, mine: Tap) -> None:
        super().__init__(site, config)
        self.before, self.mine = before, mine

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        low, before = self.layer.apply(x, A), self.before.get()
        self.mine.put(low.detach())
        return self.layer.add(y, low if before is None else low + before, B, 1.0)


def graft_in_a_row(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    before = Tap()
    for site in surgeon.sites():
        mine = Tap()
        surgeon.graft(site, functools.partial(ReadsTheOneBefore, before=before, mine=mine), config)
        before = mine


MUTANTS: dict[str, Entry] = {
    "each_block_may_run_again": (mutant("in_a_row", tags=NOT_MERGEABLE, inject=graft_in_a_row), "llama"),
    "data_counts_where_it_is_asked_for": (
        mutant("looks_and_forgets", tags=WITH_DATA, calibrate=looks_and_forgets),
        "mlp",
    ),
    "data_that_breaks_off_leaves_no_trace": (
        mutant("marks_the_host", Sees, tags=WITH_DATA, inject=graft_seeing, calibrate=marks_the_host),
        "mlp",
    ),
    "steps_count_where_they_are_asked_for": (mutant("does_nothing", tags=SCHEDULED, on_step=does_nothing), "mlp"),
    "what_a_schedule_did_is_saved": (mutant("scales_itself", Grows, tags=SCHEDULED, on_step=scales), "mlp"),
    "the_own_loss_is_a_number": (mutant("adds_a_vector", aux_loss=adds_a_vector), "mlp"),
    "own_losses_wait_for_a_loop": (mutant("keeps_its_loss", aux_loss=keeps_its_loss), "mlp"),
    "the_optimizer_holds_what_trains": (mutant("all_of_them", parameter_groups=all_of_them), "mlp"),
    "it_learns": (mutant("hardly_moves", parameter_groups=hardly_moves), "task"),
    "training_resumes_exactly": (mutant("counts_steps", Counts, tags=SCHEDULED, on_step=grows), "mlp"),
}
