"""Plans of modules: the operators that act at one module while certain adapters are active. A plan is computed once, so
that a forward only looks it up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from peftcore.contract.compositions import Composition
from peftcore.contract.operators import Combiner, InputOperator, Operator, WeightOperator, _Base, is_mergeable
from peftcore.forward.choice.active_adapters import Active, Key
from peftcore.forward.tensors.expert_updates import Pair, factors_of, lazy_weight
from peftcore.forward.tensors.mount import Effect, HeldSlices, Mount, around_slices, effects_of, fold
from peftcore.layers.layer import Layer
from peftcore.utils.autocast import autocasts, full_precision

Mounts = Mapping[str, list[Mount]]
"""The mounts (operators at their sites) of a module by injection name, for all loaded injections. A plan selects those
of the active injections."""


@dataclass(frozen=True, eq=False)
class ActivationForm:
    """The activation form of a weight operator: it wraps the module's forward instead of changing the weight."""

    mount: Mount
    operator: WeightOperator
    bare: ActivePlan

    @classmethod
    def of(cls, mount: Mount, attributes: Mapping[str, Any]) -> Self | None:
        """Returns the activation form of a mount, which wraps the forward instead of changing the weight. None if the
        operator does not define one, or if its tensor is not the weight of a linear layer that is called."""
        operator = mount.operator
        called = mount.layer.called and mount.form == "weight" and mount.tensor == "weight"
        if not called or not isinstance(operator, WeightOperator):
            return None
        if type(operator).prefers_activation_form is WeightOperator.prefers_activation_form:
            return None
        bare = ActivePlan(attributes=attributes, needs_recompute=mount.layer.saves_dense, packed=mount.layer.packed)
        return cls(mount, operator, bare)

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """A tuple with the only mount of this form, as in `ActivePlan.mounts`."""
        return (self.mount,)

    def prepare(self, module: nn.Module) -> Any:
        """Returns the result of the operator's `prepare`, which does not depend on the input. It is computed in the
        operator's precision."""
        with full_precision(self.mount.layer.like(module, self.mount.tensor)):
            return self.operator.prepare(HeldSlices(self.mount, module))

    def around(self, call: Callable[..., Any], prepared: Any) -> Callable[..., Any]:
        """Returns the forward `call`, wrapped in the operator, so that the operator does not change the weight."""

        def act(inner: Callable[..., Tensor], x: Tensor) -> Tensor:
            return self.operator.activation_form(inner, x, prepared)

        if self.mount.slices is None:
            return functools.partial(act, call)
        return functools.partial(around_slices, act, self.mount, call)


Made = Callable[[str, Callable[[], Any]], Any]
"""A function that returns an effective tensor, given the tensor's path and a function that computes it."""


@dataclass(eq=False, slots=True)
class ActivePlan:
    """The operators of one set of active injections at one module."""

    effects: tuple[tuple[str, tuple[Effect, ...]], ...] = ()
    """The effects of operators on tensors, by path below the module."""
    onion: tuple[Mount, ...] = ()
    attention: tuple[Mount, ...] = ()
    observers: tuple[Mount, ...] = ()
    """Operators that only observe; they wrap all other operators."""
    inputs: tuple[Mount, ...] = ()
    """Operators that only change the arguments; they run before all other operators except the observers."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    needs_recompute: bool = False
    """Whether the forward makes tensors that must be freed after use: then backward computes the forward again."""
    packed: bool = False
    """Whether a tensor that the operators act on is quantized, so that each effective tensor is a dense copy."""
    view_class: type[nn.Module] | None = None
    """The class whose forward runs with the tensors that operators have changed; None for the module's own class."""
    activation_form: ActivationForm | None = None
    """The activation form of the only mount that acts on tensors, if it has one. It wraps the forward instead of
    changing a tensor."""
    linear_only: bool = True
    """Whether the module only multiplies by the tensors that the operators change, once by each."""
    product: Layer | None = None
    """The layer of the changed weight, if the module is a linear layer with a dense weight; otherwise None."""
    updates: bool = False
    """Whether all operators that change tensors are low-rank updates of stacked matrices."""
    low_memory: bool = False
    """Whether to use as little memory as possible."""

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """The mounts (operators at their sites) that act on tensors."""
        return tuple([effect.mount for _, effects in self.effects for effect in effects])

    def is_cast(self, module: nn.Module) -> bool:
        """Whether autocast casts the tensors that operators have changed, so that the module saves the cast copies for
        backward."""
        likes = (each[0].mount.layer.like(module, path) for path, each in self.effects)
        return any(
            autocasts(like.device.type) and torch.get_autocast_dtype(like.device.type) is not like.dtype
            for like in likes
        )

    def effective(self, module: nn.Module) -> dict[str, Tensor | None]:
        """Returns the effective tensors (changed by the operators) by path below the module, computed in the precision
        of the operators."""
        return {path: make() for path, make in self.makes(module).items()}

    def factors(self, module: nn.Module) -> Mapping[str, Pair] | None:
        """Returns the low-rank update of each changed tensor; None if another kind of operator changes a tensor."""
        found = {}
        for path, effects in self.effects if self.updates else ():
            factors = factors_of(effects[0].mount.layer.read(module, path), [effect.mount for effect in effects])
            if factors is None:
                return None
            found[path] = factors
        return found or None

    def lazy_weights(self, module: nn.Module, factors: Mapping[str, Pair], made: Made) -> dict[str, Tensor | None]:
        """Returns lazy weights, which represent W + BA without computing it, by path. If the values of one are read,
        `made` computes them."""
        found: dict[str, Tensor | None] = {}
        for path, effects in self.effects:
            layer, make = effects[0].mount.layer, functools.partial(_make, module, path, effects)
            found[path] = lazy_weight(
                layer.read(module, path), layer, factors[path], functools.partial(made, path, make)
            )
        return found

    def makes(self, module: nn.Module) -> dict[str, Callable[[], Tensor | None]]:
        """Returns, for each changed tensor by path, a function that computes its value with all operators applied."""
        return {path: functools.partial(_make, module, path, each) for path, each in self.effects}


def _make(module: nn.Module, path: str, effects: tuple[Effect, ...]) -> Tensor | None:
    layer = effects[0].mount.layer
    like = layer.like(module, path)
    with full_precision(like):
        return layer.for_forward(module, path, fold(module, effects, layer.read(module, path), like))


def plan_acting(
    mounts: Mounts, forced_attributes: list[tuple[str | None, Mapping[str, Any]]], active: Active
) -> ActivePlan:
    """Returns the plan of the `active` injections, which act in the order in which they were applied. An operator that
    wraps the module acts on the weight instead, if it can be merged and a later operator acts on the weight. So the
    result equals that of merging the injections one after the other."""
    weight: list[Mount] = []
    onion: list[Mount] = []
    attention: list[Mount] = []
    observers: list[Mount] = []
    inputs: list[Mount] = []
    for name in active:
        for mount in mounts.get(name, ()):
            if mount.form in mount.operator.observes:
                observers.append(mount)
            elif isinstance(mount.operator, InputOperator):
                inputs.append(mount)
            elif mount.form == "weight":
                weight += [*(before for before in onion if is_mergeable(before.operator)), mount]
                onion = [before for before in onion if not is_mergeable(before.operator)]
            else:
                (attention if mount.form == "attention" else onion).append(mount)
    attributes: dict[str, Any] = {}
    for owner, forced in forced_attributes:
        if owner is None or owner in active:
            attributes.update(forced)
    needs_recompute = packed = False
    for mount in onion:
        needs_recompute, packed = needs_recompute or mount.layer.saves_dense, packed or mount.layer.packed
    if not weight:  # as nearly always
        return ActivePlan(
            onion=tuple(onion),
            attention=tuple(attention),
            observers=tuple(observers),
            inputs=tuple(inputs),
            attributes=attributes,
            needs_recompute=needs_recompute,
            packed=packed,
        )
    packed = packed or any(mount.layer.packed for mount in weight)
    effects = effects_of(weight)
    return ActivePlan(
        effects=tuple((path, tuple(each)) for path, each in effects.items()),
        onion=tuple(onion),
        attention=tuple(attention),
        observers=tuple(observers),
        inputs=tuple(inputs),
        attributes=attributes,
        needs_recompute=needs_recompute or any(mount.operator.needs_recompute for mount in weight),
        packed=packed,
        view_class=next((mount.layer.runs_dense for mount in weight if mount.layer.runs_dense), None),
        activation_form=ActivationForm.of(weight[0], attributes) if len(weight) == 1 else None,
        linear_only=all(mount.layer.one_product for mount in weight),
        product=_product(effects),
        updates=not packed and all(map(_updates_stack, weight)),
    )


def _product(effects: Mapping[str, list[Effect]]) -> Layer | None:
    if "weight" not in effects or not effects.keys() <= {"weight", "bias"}:
        return None
    layer = effects["weight"][0].mount.layer
    return layer if layer.called and layer.of_vectors and not layer.packed else None


def _updates_stack(mount: Mount) -> bool:
    """Whether an operator may be a low-rank update of stacked matrices that a module reads one by one, and does not
    change the bias."""
    kind, layer = type(mount.operator), mount.layer
    low_rank = kind.factors is not _Base.factors and kind.merged_bias is _Base.merged_bias
    return low_rank and layer.batch_dims > 0 and not layer.called


def layers_of(acting: ActivePlan) -> tuple[Operator, ...] | None:
    """Returns the operators of a plan, innermost first, if all of them only wrap the module's forward; otherwise
    None."""
    others = acting.effects or acting.attention or acting.observers or acting.inputs or acting.attributes
    if others or acting.needs_recompute:
        return None
    operators = []
    for mount in acting.onion:
        operator = mount.operator
        if mount.slices or not isinstance(operator, Operator) or type(operator).at is not Operator.at:
            return None
        operators.append(operator)
    return tuple(operators)


def updates_of(routed: Sequence[ActivePlan]) -> tuple[tuple[int, Mount], ...]:
    """Returns the low-rank updates of the injections of a route, with their positions in it. Empty if any other
    operator acts at the module."""
    if not all(_is_update(mount) for acting in routed for mount in acting.onion):
        return ()
    if any(acting.effects or acting.attention or acting.attributes for acting in routed):
        return ()
    return tuple((position, mount) for position, acting in enumerate(routed) for mount in acting.onion)


def _is_update(mount: Mount) -> bool:
    """Whether an operator adds ``scale * B A x`` to each vector and does nothing else."""
    kind = type(mount.operator)
    activation_form = issubclass(kind, Operator) and kind.at is Operator.at and kind.merged_bias is _Base.merged_bias
    called = mount.layer.called and mount.layer.of_vectors and mount.form == "activation"
    return activation_form and called and mount.operator.factors() is not None


@dataclass(eq=False, slots=True)
class ModulePlan:
    """The plan of one module for one choice (active adapters, with their route or composition)."""

    key: Key
    acting: ActivePlan
    """The operators. With a route: those for the whole batch, in which attention edits select their rows themselves."""
    inner: tuple[Operator, ...] = ()
    outermost: Operator | None = None
    """`inner` and `outermost` contain the operators if all of them only wrap the forward: a fast path for decoding."""
    routed: tuple[ActivePlan, ...] = ()
    """With a route: the plan of each of its injections, for the rows of this injection."""
    updates: tuple[tuple[int, Mount], ...] = ()
    """With a route: the low-rank updates of its injections, with their positions in it. Empty if another operator acts
    at this module."""
    composition: Composition | None = None
    branches: Mapping[Active, ActivePlan] = field(default_factory=dict)
    """With a composition: the plan of each branch; branches with the same operators share one object."""
    combiners: Mapping[str, Combiner] = field(default_factory=dict)
    """With a composition: the combiners (operators that combine branches) at this module, by injection."""
