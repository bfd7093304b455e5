"""Runs equal operators of several adapters as one, by `torch.vmap` over their stacked tensors.

If N adapters have the same method, size and number of rows, this launches hardly more operations than a single adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from peftcore.contract.operators import Shared, _Base, tables
from peftcore.forward.choice.active_adapters import Positions, Route
from peftcore.forward.plan.plan import ActivationForm, ActivePlan
from peftcore.forward.tensors.mount import Effect, Mount
from peftcore.forward.tensors.view import TORCHS
from peftcore.layers.kinds import DENSE
from peftcore.layers.layer import plain_class

Inner = Callable[[ActivePlan], Callable[..., Any]]
"""A function that returns the module's forward with the operators of a plan inside it."""


Form = Callable[[ActivePlan], ActivationForm | None]
"""A function that returns the activation form of a plan for the current rows (an operator on activations instead of the
weight). None if the plan acts on the weight."""
Prepare = Callable[[ActivationForm], Any]
"""A function that returns the prepared values of an activation form: a tensor, a tuple of tensors, or None."""


def positions_alike(
    acting: Mapping[int, ActivePlan | None], route: Route, module: nn.Module, form: Form
) -> list[Positions]:
    """Returns the positions of a route (the numbers of its adapters) in groups whose operators can run as one.
    The positions of a group have equal operators and equal numbers of rows. All positions without operators form one
    group."""
    groups: dict[Hashable, list[int]] = {}
    for position, each in acting.items():
        seeded = position >= 0 and bool(route.seeds) and route.seeds[position] is not None
        looks = None if each is None else _looks_of(each, module, form(each), seeded)
        alone = position if looks is None else (looks, route.sizes[position])
        groups.setdefault("bare" if each is None else alone, []).append(position)
    return [tuple(group) for group in groups.values()]


def may_draw(acting: ActivePlan, form: ActivationForm | None) -> bool:
    """Whether the operators of one adapter at a module may draw random numbers: one of them is not stackable, or has
    active dropout."""
    return any(not each.stackable or _draws(each) for each in _operators(acting, form))


def as_one(
    acting: Sequence[ActivePlan],
    module: nn.Module,
    x: Tensor,
    bare: Callable[..., Any],
    inner: Inner,
    form: Form,
    prepare: Prepare,
) -> Callable[[], Tensor]:
    """Returns a function that runs equal operators of several adapters at a module, each on the same number of rows.
    Its output is ``[rows, ...]``.

    Args:
        acting: the plan of each adapter.
        module: the module, which is called with one tensor.
        x: the input ``[rows, ...]``: the rows of the first adapter, then those of the next, and so on.
        bare: the forward of the base model for these rows.
        inner: returns the forward with the tensors that the operators of a plan have changed.
        form: returns the activation form of a plan: an operator on activations instead of the weight.
        prepare: returns the prepared values of an activation form. It is called for each adapter separately, since it
            reads a weight.
    """
    forms = [form(plan) for plan in acting]
    plans = [plan if each is None else replace(plan, effects=()) for plan, each in zip(acting, forms, strict=True)]
    first, of_first = plans[0], forms[0]
    operators = _operators(first, of_first)
    shares = not first.effects and not any(operator.changes_inputs for operator in operators)
    ready = [None if each is None else prepare(each) for each in forms]
    own, own_dims = _stack_all(
        [tensor for each in _operators(plan, of_plan) for tensor in _tensors(each)]
        for plan, of_plan in zip(plans, forms, strict=True)
    )
    parts, part_dims = _stack_all([*each] if isinstance(each, tuple) else [each] for each in ready)

    def run(own: list[Tensor], parts: list[Tensor | None], x: Tensor, y: Tensor | None) -> Tensor:
        values = iter(own)
        stand_ins = {id(each): _with(each, values) for each in operators}
        plan = _plan_with(first, stand_ins)

        def unchanged(inputs: Tensor) -> Tensor:
            return y if y is not None and inputs is x else bare(inputs)

        call: Callable[..., Any] = inner(plan) if first.effects else bare if y is None else unchanged
        if of_first is not None:
            stand_in = stand_ins[id(of_first.operator)]
            mount = replace(of_first.mount, operator=stand_in)
            prepared = tuple(parts) if isinstance(ready[0], tuple) else parts[0]
            call = replace(of_first, mount=mount, operator=stand_in).around(call, prepared)
        for mount in plan.onion:
            call = mount.around(call, module)
        output: Tensor = call(x)
        return output

    outputs = _by_adapter(bare(x), len(acting)) if shares else None
    dims = own_dims, part_dims, 0, None if outputs is None else 0
    run_all: Callable[..., Tensor] = torch.vmap(run, dims, randomness="different")
    return functools.partial(run_all, own, parts, _by_adapter(x, len(acting)), outputs)


def _stack_all(tables: Iterable[Sequence[Any]]) -> tuple[list[Any], list[int | None]]:
    """Returns the values of several adapters as one list, with tensors stacked, and the stacked dimension of each
    value; None for a value that all adapters share."""
    columns = [*zip(*tables, strict=True)]
    one_for_all = [all(each is column[0] for each in column) for column in columns]
    values = [column[0] if one else stacked(column) for one, column in zip(one_for_all, columns, strict=True)]
    return values, [None if one else 0 for one in one_for_all]


def _by_adapter(x: Tensor, count: int) -> Tensor:
    return x.view(count, -1, *x.shape[1:])


def _operators(plan: ActivePlan, form: ActivationForm | None) -> list[_Base]:
    """Returns the operators of a plan, each once, in order."""
    mounts = (*(plan.mounts if form is None else form.mounts), *plan.onion)
    return [*{id(mount.operator): mount.operator for mount in mounts}.values()]


def _plan_with(plan: ActivePlan, stand_ins: Mapping[int, Any]) -> ActivePlan:
    """Returns a plan in which operators are replaced by the `stand_ins`, whose keys are the `id` of each operator."""

    def of(mount: Mount) -> Mount:
        return replace(mount, operator=stand_ins[id(mount.operator)])

    def effect_of(effect: Effect) -> Effect:
        before = None if effect.before is None else tuple([of(mount) for mount in effect.before])
        return replace(effect, mount=of(effect.mount), before=before)

    effects = tuple([(path, tuple([effect_of(each) for each in effects])) for path, effects in plan.effects])
    return replace(plan, effects=effects, onion=tuple([of(mount) for mount in plan.onion]))


def _looks_of(acting: ActivePlan, module: nn.Module, form: ActivationForm | None, seeded: bool) -> Hashable | None:
    """Returns a key that is equal for plans that differ only in the values of tensors; None if a plan must run by
    itself.

    It must if an operator is not stackable, if it acts on matrices (an effective matrix for each adapter would take too
    much memory), or if the plan is `seeded` and its operators may draw random numbers.
    """
    effects = () if form is not None else acting.effects
    if acting.attributes or acting.attention or any(_dims(module, path, each) > 1 for path, each in effects):
        return None
    mounts = (*(acting.mounts if form is None else form.mounts), *acting.onion)
    if seeded and any(_draws(mount.operator) for mount in mounts):
        return None
    runs_again = bool(effects) or any(mount.operator.changes_inputs for mount in mounts)
    if runs_again and any(mount.layer.packed or mount.layer.in_pieces for mount in mounts):
        # Neither their kernels nor what gathers pieces know anything of vmap.
        return None
    looks = tuple(_looks_of_mount(mount) for mount in mounts)
    return None if None in looks else (form is None, looks)


def _draws(operator: _Base) -> bool:
    """Whether a stackable operator may draw random numbers: it has dropout and is in training mode."""
    told = any(vars(operator).get(name) for name in operator.training_only)
    return operator.training and (told or any(isinstance(each, _DropoutNd) and each.p for each in operator.modules()))


def _dims(module: nn.Module, path: str, effects: tuple[Effect, ...]) -> int:
    stored = effects[0].mount.layer.read(module, path)
    return 1 if stored is None else stored.dim()  # a missing one is a bias


def _looks_of_mount(mount: Mount) -> Hashable | None:
    looks = _looks_of_module(mount.operator) if mount.operator.stackable else None
    return None if looks is None else (mount.form, mount.tensor, mount.slices, looks)


def _looks_of_module(module: nn.Module) -> Hashable | None:
    """Returns a key that is equal for modules that differ only in the values of tensors. None if a module has hooks, or
    attributes other than tensors, plain values and submodules."""
    own = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    looks: list[Any] = [type(module), own["training"]]
    for name in [name for name in own if name not in _OWN]:
        value = own[name]
        if isinstance(value, Shared):
            value = _looks_of_module(value.module)
            if value is None:
                return None
        elif not _is_plain(value):
            return None
        looks += name, value
    for table in tables(module):
        for name, tensor in table.items():
            if tensor is None:
                looks.append(name)
            elif type(tensor) not in DENSE:
                return None
            else:
                looks += name, tensor.shape, tensor.dtype, tensor.device
    for name, child in own["_modules"].items():
        inside = None if child is None else _looks_of_module(child)
        if child is not None and inside is None:
            return None
        looks += name, inside
    return tuple(looks)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (type(value) is tuple and all(map(_is_plain, value)))


_PLAIN = (int, float, str, type(None), FunctionType)
_OWN = TORCHS | {"layer"}
"""Attributes that are not compared: the layer belongs to the module, which is the same for all."""


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yields the tensors that an operator computes with, in the order in which `_with` replaces them."""
    yield from (tensor for table in tables(module) for tensor in table.values() if tensor is not None)
    for child in (*module._modules.values(), *_shared(module).values()):
        if child is not None:
            yield from _tensors(child)


def _shared(module: nn.Module) -> Mapping[str, nn.Module]:
    return {name: value.module for name, value in vars(module).items() if isinstance(value, Shared)}


def _with(module: nn.Module, values: Iterator[Tensor]) -> Any:
    """Returns an object that computes like the module, but with the next `values` as its tensors."""
    stand_in: nn.Module = object.__new__(plain_class(module))
    fields = dict(vars(module))
    for table in ("_parameters", "_buffers"):
        fields[table] = {name: None if tensor is None else next(values) for name, tensor in vars(module)[table].items()}
    fields["_modules"] = {
        name: None if child is None else _with(child, values) for name, child in module._modules.items()
    }
    fields.update({name: Shared(_with(held, values)) for name, held in _shared(module).items()})
    stand_in.__dict__.update(fields)
    return stand_in


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Returns tensors of one shape stacked to ``[tensors, ...]``, as `torch.stack` does. Backward splits the gradient
    in one operation instead of two for each tensor."""
    if torch.compiler.is_compiling():  # compilers know torch's own; of ours, dynamo of torch 2.13 takes wrong rows
        return torch.stack([*tensors])
    return _Stack.apply(*tensors)  # type: ignore[no-any-return, no-untyped-call]


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].contiguous().unbind()
