"""For each check of merging a method that fails it, and it only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from mutant_base import NOT_MERGEABLE, Entry, Small, mutant
from mutants_lifecycle import sabotaged
from torch import Tensor, nn

from peftcore import Injection
from peftcore.author import Method, MethodConfig, Replacement, Site
from peftcore.errors import MergeError
from peftcore.forward.choice.active_adapters import Choice
from peftcore.forward.choice.merged_choice import check_merge
from peftcore.forward.state.host_state import HostState
from peftcore.forward.state.recorder import Recorder
from peftcore.injection import merging
from peftcore.injection.merge_writes import Replaced
from peftcore.injection.originals import Keep
from peftcore.utils.journal import Journal


class ActsAgain(Recorder):
    """Counts forwards while something is merged; from the third on, merged operators act besides."""

    count = 0

    def enter(self, state: HostState, *call: Any) -> None:
        self.count += bool(state.merged)
        if self.count == 3:
            state.merged = ()
            for slot in state.slots:
                slot.changed()
        super().enter(state, *call)


def acting_again(self: Method, model: nn.Module, config: Any, injection: Injection) -> None:
    Method.trainable(self, model, config, injection)
    if isinstance(injection, Injection):
        injection.state.recorder.__class__ = ActsAgain


class OverridesUntold(Replacement):
    """A value of its own for the weight, and no word about it."""

    overrides = False

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site)


class DoublesInBFloat16(Small):
    """Doubles its update in bfloat16, in evaluation."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = super().forward(call, x)
        twice = x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        return 2 * y - call(x) if twice else y


def off_by_a_bit(injection: Injection) -> None:
    careless = injection._merge is not None and injection._merge.wanted.keep == "record"
    Injection.unmerge(injection)
    if careless:
        weight = next(injection.model.parameters())
        weight.data.view(-1)[0] = torch.nextafter(weight.data.float().view(-1)[0], torch.tensor(9.0)).to(weight.dtype)


def exactly_removed(injection: Injection) -> None:
    injection.__dict__.pop("unmerge", None)
    Injection.remove(injection)


def keeps_anyway(injection: Injection, keep: Keep = "cpu", **how: Any) -> None:
    Injection.merge(injection, keep or "cpu", **how)


def merges_again(injection: Injection, keep: Keep = "cpu", **how: Any) -> None:
    injection._note(Journal(), None)
    Injection.merge(injection, keep, **how)


def unmerges_below_others(injection: Injection) -> None:
    state = injection.state
    merged, state.merged = state.merged, (injection.name,)
    with mock.patch.object(Replaced, "changed", lambda self, there: iter(())):
        Injection.unmerge(injection)
    state.merged = tuple(name for name in merged if name in state.merged or name != injection.name)


def evaluates_the_host(injection: Injection, keep: Keep = "cpu", **how: Any) -> None:
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


def merges_tied(injection: Injection, keep: Keep = "cpu", **how: Any) -> None:
    try:
        Injection.merge(injection, keep, **how)
    except MergeError as error:
        if "is tied to" not in str(error):
            raise
        with mock.patch.object(merging, "_check_ties", lambda model, new: None):
            Injection.merge(injection, keep, **how)


def forgets_to_unmerge(injection: Injection) -> None:
    if injection._merge is not None and injection._merge.wanted.keep is not None:
        injection._note(Journal(), None)
    Injection.remove(injection)


def merges_under_any_choice(injection: Injection, keep: Keep = "cpu", **how: Any) -> None:
    def check(injections: Any, merged: Any, name: str, choice: Choice, where: str = "") -> None:
        if choice.route is None and choice.composition is None and name in choice.active:
            check_merge(injections, merged, name, choice, where)

    with mock.patch.object(merging, "check_merge", check):
        Injection.merge(injection, keep, **how)


def loses_computed_weights(injection: Injection, keep: Keep = "cpu", **how: Any) -> None:
    with mock.patch.object(merging._Writer, "_write_computed", lambda *_: None):
        Injection.merge(injection, keep, **how)


MUTANTS: dict[str, Entry] = {
    "merging_keeps_the_outputs": (mutant("acts_again", trainable=acting_again), "mlp"),
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
    "what_overrides_says_so": (
        mutant("overrides_untold", OverridesUntold, parameter_count=lambda site, config: site.weight().numel()),
        "mlp",
    ),
    "methods_that_cannot_merge_say_so": (mutant("merges_untold", tags=NOT_MERGEABLE), "mlp"),
    "merging_goes_with_the_choice": (sabotaged("merges_under_any_choice", merge=merges_under_any_choice), "mlp"),
    "computed_weights_merge_as_any": (sabotaged("loses_computed_weights", merge=loses_computed_weights), "mlp"),
    "tied_tensors_are_never_changed_silently": (sabotaged("merges_tied", merge=merges_tied), "mlp"),
    "removing_a_merged_injection_restores_the_base": (
        sabotaged("forgets_to_unmerge", remove=forgets_to_unmerge),
        "mlp",
    ),
}
