"""The slot of an adapted module: its operators, and one plan for each choice of active adapters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.contract.compositions import Combiners, Composition, branches, mixed
from peftcore.contract.operators import Combiner, is_mergeable, tables
from peftcore.errors import CompositionError
from peftcore.forward.choice.active_adapters import Active, Choice, Key, Route
from peftcore.forward.choice.merged_choice import check_choice
from peftcore.forward.plan.plan import (
    ActivationForm,
    ActivePlan,
    Made,
    ModulePlan,
    layers_of,
    plan_acting,
    updates_of,
)
from peftcore.forward.state.host_state import HostState
from peftcore.forward.tensors.cache import WeightCache, open_cache
from peftcore.forward.tensors.expert_updates import Pair
from peftcore.forward.tensors.mount import Mount, overridden
from peftcore.forward.tensors.recompute import Unwritten
from peftcore.layers.fsdp import MANAGED
from peftcore.layers.layer import SLOT

Tables = tuple[Mapping[str, Tensor | None], ...]


@dataclass(frozen=True, eq=False)
class Edits:
    """The edits (operators inside attention) of one attention module in one forward."""

    mounts: tuple[Mount, ...]
    slot: Slot
    """The module's slot, in which `run_edits` records that the module ran."""
    route: Route | None = None
    """The route, if rows of the batch use different injections. Each mount acts only on the rows of its injection."""


class Slot:
    """The state of one adapted module: its mounts (operators at their sites), whether it ran, and its plans."""

    def __init__(self, state: HostState) -> None:
        self.state = state
        self.path = ""
        """Path of the module in the host, when it was first adapted."""
        self.mounts: dict[str, list[Mount]] = {}
        self.forced_attributes: list[tuple[str | None, Mapping[str, Any]]] = []
        self.ran = [False, False]
        """Whether the module ran in evaluation, and whether it ran in training. Recorded while the host watches
        runs."""
        self.runs: int | None = None
        """The number of runs in this forward; None if `WatchedSites` does not count them."""
        self.planned: ModulePlan | None = None
        self.plans: dict[Key, ModulePlan] = {}
        self.asked: dict[tuple[Mount, ...], Tables] = {}
        self.edition = object()
        """Replaced by a new object when the operators or the merged injections change."""
        self.rewritten = object()
        """Replaced by a new object when a merge writes to the module's tensors."""

    @property
    def cache(self) -> WeightCache | None:
        """The open cache for values computed from weights; None if each forward computes them again."""
        return open_cache(self.state)

    def effective(self, module: nn.Module, acting: ActivePlan) -> Mapping[str, Tensor | None]:
        """Returns the effective tensors (changed by the operators). If a cache is open, they are stored in it, so that
        decoding does not compute every weight again."""
        made: Mapping[str, Tensor | None] = self._cached("effective", module, acting, lambda: acting.effective(module))
        return made

    def factors(self, module: nn.Module, acting: ActivePlan) -> Mapping[str, Pair] | None:
        """Returns the low-rank updates of the tensors that the module reads. If a cache is open, they are stored in
        it."""
        made: Mapping[str, Pair] | None = self._cached("factors", module, acting, lambda: acting.factors(module))
        return made

    def keeping(self, module: nn.Module, acting: ActivePlan) -> Made:
        """Returns a function that returns one effective tensor (changed by the operators). If a cache is open, it is
        stored there."""
        return lambda path, make: self._cached(("effective", path), module, acting, make)

    def _cached(self, what: Hashable, module: nn.Module, acting: ActivePlan, make: Callable[[], Any]) -> Any:
        cache = self.cache
        if cache is None:
            return make()
        under = self.edition, acting.effects, self.state.now().context
        return cache.get((self, what), self.sources(module, acting), under, make)

    def prepared(self, module: nn.Module, activation_form: ActivationForm) -> Any:
        """Returns the result of an operator's `prepare`, for an operator that acts on activations instead of the
        weight. If a cache is open, the result is stored there."""
        cache = self.cache
        if cache is None:
            return activation_form.prepare(module)
        under = self.edition, self.state.now().context
        sources = self.sources(module, activation_form)
        return cache.get((self, activation_form.mount), sources, under, lambda: activation_form.prepare(module))

    def sources(self, module: nn.Module, acts: ActivePlan | ActivationForm) -> list[Tensor]:
        """Returns all tensors of the module and of its active operators. The dicts of the operators' parameters and
        buffers are looked up once, since decoding needs them at every token. Those of the module are looked up each
        time, since submodules may be replaced."""
        mounts = acts.mounts
        asked = self.asked.get(mounts)
        if asked is None:
            asked = self.asked[mounts] = tuple(table for mount in mounts for table in mount.operator.tables())
        below = (table for each in module.modules() for table in tables(each)) if module._modules else tables(module)
        return [each for table in (*below, *asked) for each in table.values() if each is not None]

    def unwritten(self, module: nn.Module, acting: ActivePlan, inputs: Sequence[Tensor] = ()) -> Unwritten:
        """Returns a record of the current versions of the inputs, and of the parameters from which effective tensors
        are computed.

        Buffers of the module are not included, because its forward may change them (running statistics). Parameters
        that FSDP manages are not included, because gathering changes them.
        """
        if MANAGED in vars(module):
            return Unwritten(inputs, lambda: self.rewritten)
        operators = (parameter for mount in acting.mounts for parameter in mount.operator.parameters())
        return Unwritten((*inputs, *module.parameters(), *operators), lambda: self.rewritten)

    def plan_for(self, choice: Choice) -> ModulePlan:
        """Returns the plan of this module for a choice of active adapters. It does not contain merged injections."""
        planned = self.planned  # read once: another thread may plan anew
        if planned is not None and planned.key == choice.key:
            return planned
        return self._plan(choice)  # a thread that chose for itself

    def plan(self, choice: Choice) -> None:
        """Compute the plan for the shared choice of active adapters in advance."""
        plans = self.plans
        self.planned = self._plan(choice)
        if self.plans is not plans:  # another thread called `changed` meanwhile: the plan may be one of before
            self.planned = None

    def _plan(self, choice: Choice) -> ModulePlan:
        plans = self.plans  # read once: `changed` in another thread puts others in their place, without this plan
        plan = plans.get(choice.key)
        if plan is None:
            plan = plans[choice.key] = self._make_plan(choice)
        return plan

    def _make_plan(self, choice: Choice) -> ModulePlan:
        check_choice(self.state.injections, self.state.merged, choice)  # one may be in force that nobody could ask
        if choice.composition is not None:
            return self._composed(choice, choice.composition)
        if choice.route is None:
            self.check_stack(choice.active)
            return self._stacked(choice, self._acting(choice.active))
        each = tuple(self._acting((name,)) for name in choice.route.names)
        edits = tuple(mount for acting in each for mount in acting.attention)
        stand = plan_acting({}, self.forced_attributes, choice.route.names)
        observers = tuple(mount for acting in each for mount in acting.observers)
        inputs = tuple(mount for acting in each for mount in acting.inputs)
        together = replace(stand, attention=edits, observers=observers, inputs=inputs)
        return ModulePlan(choice.key, together, routed=each, updates=updates_of(each))

    def _stacked(self, choice: Choice, acting: ActivePlan) -> ModulePlan:
        *inner, outermost = layers_of(acting) or (None,)
        return ModulePlan(choice.key, acting, tuple(inner), outermost)

    def _composed(self, choice: Choice, composition: Composition) -> ModulePlan:
        self.check_mixed(composition, choice.active)
        distinct: dict[Active, ActivePlan] = {}
        ways = {}
        for names in branches([composition]):
            here = tuple(name for name in names if name in self.mounts and name in choice.active)
            if here not in distinct:
                self.check_stack(here)
                distinct[here] = self._acting(here)
            ways[names] = distinct[here]
        whole, combiners = self._acting(choice.active), self._combiners(choice.active)
        if len(distinct) == 1 and not combiners:  # nothing is put together here
            (acting,) = distinct.values()  # what acts further in may force attributes here
            return self._stacked(choice, replace(acting, attributes=whole.attributes))
        return ModulePlan(choice.key, whole, composition=composition, branches=ways, combiners=combiners)

    def _combiners(self, active: Active) -> Combiners:
        mounts = (mount for name in active for mount in self.mounts.get(name, ()))
        return {mount.name: mount.operator for mount in mounts if isinstance(mount.operator, Combiner)}

    def check_mixed(self, composition: Composition, active: Active) -> None:
        """Check that the parts of a combiner change only the inputs of this module, if the combiner mixes these inputs.

        Raises:
            CompositionError: a part changes more than the input.
        """
        for by, inside in mixed(composition, self._combiners(active)):
            what = f"{by!r} mixes the inputs that its parts give to {self.path or 'the model'}, but "
            rest = ". Let it mix outputs, or leave these parts out of it"
            if isinstance(inside, Composition):
                if any(name in self.mounts and name in active for name in inside.combined()):
                    raise CompositionError(f"{what}{inside!r} inside it combines outputs{rest}")
                continue
            for name in inside if not self._only_gives(inside, active) else ():
                if not self._only_gives((name,), active):
                    raise CompositionError(f"{what}{name!r} changes more than the input there{rest}")

    def _only_gives(self, names: Active, active: Active) -> bool:
        acting = self._acting(tuple(name for name in names if name in self.mounts and name in active))
        around = all(mount.operator.only_inputs and mount.slices is None for mount in acting.onion)
        return around and not (acting.effects or acting.attention)

    def check_stack(self, active: Active) -> None:
        """Check that, among injections that act one after the other, none overrides the effect of another on this
        module.

        Raises:
            CompositionError: an injection overrides another one.
        """
        for lost, by in overridden(self.mounts, active) if len(active) > 1 else ():
            path = next(g.site.path for g in self.state.injections[by.name].grafts if g.operator is by.operator)
            raise CompositionError(
                f"{lost.name!r} and {by.name!r} both act on {path}, and {by.name!r}, which was applied later, replaces "
                f"its value, so the effect of {lost.name!r} would be lost. Activate one of them, or compose them: "
                f"peftcore.activate(model, peftcore.Sum({lost.name!r}, {by.name!r}))"
            )

    def _acting(self, active: Active) -> ActivePlan:
        unmerged = self.state.unmerged(active)
        acting = plan_acting(self.mounts, self.forced_attributes, unmerged)
        for name in unmerged:
            if name in self.mounts and self.state.injections[name].low_memory:
                acting.low_memory = True
        return acting

    def with_active(self, tensor: str, stored: Tensor) -> Tensor:
        """Returns a tensor of the module with the effects of the active injections. `stored` is the tensor as it is
        stored."""
        active = self.state.unmerged(self.state.now().active)
        with torch.no_grad():
            for mount in (each for name in active for each in self.mounts.get(name, ())):
                if mount.tensor == tensor and is_mergeable(mount.operator):
                    stored = mount.effective(stored, stored)
        return stored

    def changed(self) -> None:
        """Drop all plans and cached values."""
        self.plans, self.asked, self.edition = {}, {}, object()
        self.planned = None  # last: see `plan`

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}, "asked": {}}


def slot_of(module: nn.Module) -> Slot | None:
    """Returns the module's slot; None if the module is not adapted."""
    return module.__dict__.get(SLOT)
