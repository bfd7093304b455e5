"""For each check of merging a method that fails it, and it only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from mutant_base import NOT_MERGEABLE, Entry, Small, mutant
from mutants_lifecycle import sabotaged
from torch import Tensor, nn

from peftcore import Injection, Method, MethodConfig, Site
from peftcore.errors import MergeError
from peftcore.forward.active_adapters import Choice
from peftcore.forward.host_state import HostState
from peftcore.injection import merging


class UnmergesWhenIdle(HostState):
    """When no injection acts, merged ones are taken out of the weights."""

    def set(self, choice: Choice) -> None:
        super().set(choice)
        for injection in [] if choice.active else self.injections.values():
            injection.unmerge()


def unmerging_when_idle(self: Method, model: nn.Module, config: Any, injection: Injection) -> None:
    Method.trainable(self, model, config, injection)
    injection.state.__class__ = UnmergesWhenIdle


class DoublesInBFloat16(Small):
    """Doubles its update in bfloat16, in evaluation."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = super().forward(call, x)
        twice = x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        return 2 * y - call(x) if twice else y


def off_by_a_bit(injection: Injection) -> None:
    careless = injection.merged and injection._keep == "record"
    Injection.unmerge(injection)
    if careless:
        weight = next(injection.model.parameters())
        weight.data.view(-1)[0] = torch.nextafter(weight.data.float().view(-1)[0], torch.tensor(9.0)).to(weight.dtype)


def exactly_removed(injection: Injection) -> None:
    injection.__dict__.pop("unmerge", None)
    Injection.remove(injection)


def keeps_anyway(injection: Injection, keep: merging.Keep = "cpu", **how: Any) -> None:
    Injection.merge(injection, keep or "cpu", **how)


def merges_again(injection: Injection, keep: merging.Keep = "cpu", **how: Any) -> None:
    injection.merged = False
    Injection.merge(injection, keep, **how)


def unmerges_below_others(injection: Injection) -> None:
    others = [other for other in injection.state.injections.values() if other is not injection and other.merged]
    for other in others:
        other.merged = False
    try:
        Injection.unmerge(injection)
    finally:
        for other in others:
            other.merged = True


def evaluates_the_host(injection: Injection, keep: merging.Keep = "cpu", **how: Any) -> None:
    Injection.merge(injection, keep, **how)
    for path, module in injection.model.named_modules():
        if not path.startswith("peft"):
            module.training = False


def signs_the_host(injection: Injection) -> None:
    Injection.bake(injection)
    injection.model.baked = True


class HidesNumbers(Small):
    """Takes what is not finite for zero."""

    def merged(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A.flatten(1)).nan_to_num(0.0, 0.0, 0.0).view(weight.shape)


class WearsOut(Small):
    """A little more at each merge after many."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.merges = 0

    def merged(self, weight: Tensor) -> Tensor:
        self.merges += 1
        return super().merged(weight) * (1 + max(0, self.merges - 40) / 100)


class RoundsInside(Small):
    """On hosts in half precision, rounds the update before it is added."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.inner = site.weight().dtype

    def merged(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A.flatten(1)).view(weight.shape).to(self.inner).to(weight.dtype)


def merges_tied(injection: Injection, keep: merging.Keep = "cpu", **how: Any) -> None:
    try:
        Injection.merge(injection, keep, **how)
    except MergeError as error:
        if "is tied to" not in str(error):
            raise
        with mock.patch.object(merging, "_check_ties", lambda model, new: None):
            Injection.merge(injection, keep, **how)


def forgets_to_unmerge(injection: Injection) -> None:
    if injection.originals is not None:
        injection.merged = False
    Injection.remove(injection)


MUTANTS: dict[str, Entry] = {
    "merging_keeps_the_outputs": (mutant("unmerges_when_idle", trainable=unmerging_when_idle), "mlp"),
    "merging_keeps_the_outputs_in_bfloat16": (mutant("doubles_in_bfloat16", DoublesInBFloat16), "mlp"),
    "unmerging_restores_every_bit": (sabotaged("off_by_a_bit", unmerge=off_by_a_bit, remove=exactly_removed), "mlp"),
    "nothing_kept_is_nothing_promised": (sabotaged("keeps_anyway", merge=keeps_anyway), "mlp"),
    "merging_twice_is_merging_once": (sabotaged("merges_again", merge=merges_again), "mlp"),
    "several_merge_in_order": (sabotaged("unmerges_below_others", unmerge=unmerges_below_others), "mlp"),
    "merging_changes_values_alone": (sabotaged("evaluates_when_merging", merge=evaluates_the_host), "mlp"),
    "baking_leaves_a_plain_model": (sabotaged("signs_the_host", bake=signs_the_host), "mlp"),
    "what_is_not_finite_is_refused": (mutant("hides_numbers", HidesNumbers), "mlp"),
    "fifty_merges_drift_by_nothing": (mutant("wears_out", WearsOut), "mlp"),
    "merging_rounds_once": (mutant("rounds_inside", RoundsInside), "mlp"),
    "methods_that_cannot_merge_say_so": (mutant("merges_untold", tags=NOT_MERGEABLE), "mlp"),
    "tied_tensors_are_never_changed_silently": (sabotaged("merges_tied", merge=merges_tied), "mlp"),
    "removing_a_merged_injection_restores_the_base": (
        sabotaged("forgets_to_unmerge", remove=forgets_to_unmerge),
        "mlp",
    ),
}
