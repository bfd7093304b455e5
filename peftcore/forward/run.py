"""The forward of an adapted module: the base forward with operators inside it, around it, for rows and in branches.

1. Weight operators compute effective tensors, and the base forward runs on a view with these; or they act on
   activations instead.
2. Operators wrap the result, the first applied innermost.
3. A route puts rows together, a composition its branches.
4. Operators that only look stand around all of this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftcore.contract.calls import Calls
from peftcore.contract.compositions import composed
from peftcore.contract.operators import Factors, InputOperator
from peftcore.forward.active_adapters import Route
from peftcore.forward.alike import may_draw, positions_alike, run_alike
from peftcore.forward.attention import AttentionOperator
from peftcore.forward.batched_updates import add_updates
from peftcore.forward.context import HERE, forward_context
from peftcore.forward.draws import draws_of
from peftcore.forward.mount import Mount
from peftcore.forward.plan import ActivationForm, ActivePlan, ModulePlan
from peftcore.forward.recompute import RecomputedTensors, Unwritten
from peftcore.forward.routing import (
    OfSomeRows,
    OneForward,
    OwnRows,
    by_tokens,
    own_rows,
    put_together,
    rows_seen,
    select_rows,
)
from peftcore.forward.slot import Edits, Slot, slot_of
from peftcore.forward.taps import branches
from peftcore.forward.view import view
from peftcore.layers.fsdp import MANAGED
from peftcore.layers.kernels import runs_plain, saves_elsewhere, transformed
from peftcore.layers.kinds import is_linear

Forward = Callable[..., Any]


def run(
    plain: Forward,
    slot: Slot,
    module: nn.Module,
    planned: ModulePlan,
    route: Route | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Returns the output of a module with all that acts there.

    Args:
        plain: the forward of the module's own class.
        slot: the module's slot.
        module: the grafted module.
        planned: the module's plan under the present choice.
        route: which rows of the batch go to which injection, where they differ.
        args: the module's inputs by position, those that operators act on among them.
        kwargs: the others.
    """
    forward: Forward = functools.partial(_run, plain, slot, module, planned, route)
    for mount in reversed(planned.acting.inputs):
        forward = _with_arguments(forward, mount, route, slot)
    for observer in planned.acting.observers:
        forward = observer.around(forward, module)
    return forward(*args, **kwargs)


def _with_arguments(call: Forward, mount: Mount, route: Route | None, slot: Slot) -> Forward:
    """Returns a forward whose arguments an operator changes; with a route, those of its own adapter's rows."""
    operator = mount.operator
    assert isinstance(operator, InputOperator)

    def mine(like: Tensor) -> Tensor | None:
        return None if route is None else route.of(mount.name, len(like), like.device)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if route is None or not route.seeds:
            args, kwargs = operator.change(args, kwargs, mine)
        else:
            with draws_of(forward_context(), route, route.names.index(mount.name), f"{slot.path}:inputs", False):
                args, kwargs = operator.change(args, kwargs, mine)
        return call(*args, **kwargs)

    return forward


def _run(
    plain: Forward,
    slot: Slot,
    module: nn.Module,
    planned: ModulePlan,
    route: Route | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if planned.composition is not None:
        with _one_module(module, args, kwargs):
            return _composed(plain, slot, module, planned, args, kwargs)
    inner = _inner(plain, slot, module, planned.acting, route)
    if route is not None:
        with _one_module(module, args, kwargs):

            def rows(route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return _by_rows(plain, slot, module, planned, route, OneForward(inner, module), args, kwargs)

            return rows(route, args, kwargs) if route.since is None else by_tokens(rows, route, args, kwargs)
    return _around(planned.acting, inner, module)(*args, **kwargs)


def _one_module(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Returns the context manager for a module that runs for several injections one after the other."""
    if torch.compiler.is_compiling() or not HERE.calls:
        return nullcontext()
    return HERE.calls[-1].one_module(module, args, kwargs)


def _again(
    before: Unwritten, module: nn.Module, acting: ActivePlan, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    before.check()
    return _on_view(module, acting, args, kwargs)


def _on_view(module: nn.Module, acting: ActivePlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _run_view(module, acting, acting.effective(module), args, kwargs)


def _run_view(
    module: nn.Module,
    acting: ActivePlan,
    tensors: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if acting.product is not None and len(args) == 1 and not kwargs:  # a token: a view takes longer than the product
        bias: Any = tensors.get("bias", module.bias)
        return F.linear(*args, acting.product.logical(tensors["weight"]), bias)
    stand_in = view(module, tensors, acting.attributes, acting.view_class)
    if acting.run_view is not None:
        return acting.run_view(stand_in, args, kwargs)
    return type(stand_in).forward(stand_in, *args, **kwargs)


def _base_call(slot: Slot, module: nn.Module, acting: ActivePlan, *args: Any, **kwargs: Any) -> Any:
    """Run the base forward on a view with effective tensors. In training an effective weight does not outlive its use:
    backward computes it again. Where the module can read a lazy weight, the effective weight is computed only if it is
    asked for."""
    if not acting.needs_recompute or runs_plain():
        return _on_view(module, acting, args, kwargs)
    if not torch.is_grad_enabled():
        return _run_view(module, acting, _without_gradients(slot, module, acting), args, kwargs)
    _forget(slot)
    if not (acting.linear_only or MANAGED in vars(module)):
        hooked = saves_elsewhere() or acting.is_cast(module)  # ours would keep tensors from theirs, or see no copies
        factors = acting.factors(module)
        if factors is not None or not (acting.low_memory or hooked):
            remade = RecomputedTensors(slot.sources(module, acting), slot.unwritten(module, acting))
            tensors = (
                remade.all(acting.makes(module)) if factors is None else acting.lazy_weights(module, factors, remade)
            )
            if tensors is not None:
                with nullcontext() if hooked else remade.hooks():
                    return _run_view(module, acting, tensors, args, kwargs)
    inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    before = slot.unwritten(module, acting, inputs)
    return checkpoint(_again, before, module, acting, args, kwargs, use_reentrant=False)


def _without_gradients(slot: Slot, module: nn.Module, acting: ActivePlan) -> Mapping[str, Tensor | None]:
    """Returns the tensors that the module reads without gradients: effective tensors, in evaluation from the cache that
    is open, or lazy weights."""
    managed = MANAGED in vars(module)
    keeps = slot.cache is not None and not (
        module.training or acting.packed or acting.low_memory or managed
    )  # dense copies would undo quantization and sharding
    if acting.updates and not managed:
        factors = acting.factors(module) if module.training else slot.factors(module, acting)
        if factors is not None:
            return acting.lazy_weights(module, factors, slot.keeping(module, acting) if keeps else _make_now)
    return slot.effective(module, acting) if keeps else acting.effective(module)


def _forget(slot: Slot) -> None:
    """Drop what an open cache holds: a forward with gradients comes before a step."""
    if (cache := slot.cache) is not None:
        cache.clear()


def _make_now(path: str, make: Callable[[], Tensor | None]) -> Tensor | None:
    return make()


def _activation_form(
    plain: Forward,
    slot: Slot,
    module: nn.Module,
    acting: ActivePlan,
    activation_form: ActivationForm,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the activation form of one weight operator, where that is cheaper. In evaluation, while a cache is open, the
    operator acts on the weight instead, which is computed once, unless it may not be kept.
    """
    spare = acting.low_memory or acting.packed or torch.compiler.is_compiling() or slot.cache is None
    wanted = not acting.low_memory if _trains(module) else spare
    operator = activation_form.operator
    if not wanted or _is_offloaded(operator, *args) or not operator.prefers_activation_form(*args):
        return _base_call(slot, module, acting, *args, **kwargs)
    return _act_on_activations(_inner(plain, slot, module, activation_form.bare), slot, module, activation_form)(
        *args, **kwargs
    )


def _is_offloaded(operator: nn.Module, x: Tensor) -> bool:
    """Whether the operator's values are elsewhere until it is called itself (accelerate's offload)."""
    return not x.is_meta and any(each is not None and each.is_meta for each in operator._parameters.values())


def _trains(module: nn.Module) -> bool:
    """Whether the module trains; the first forward of a checkpoint has no gradients either, and has to do what its
    second does."""
    return torch.is_grad_enabled() or module.training


def _act_on_activations(
    inner: Forward, slot: Slot, module: nn.Module, activation_form: ActivationForm
) -> Callable[..., Any]:
    """Returns `inner` with the activation form of a weight operator. In evaluation, values that no input changes come
    from the cache that is open."""
    return activation_form.around(inner, _prepared(slot, module, activation_form))


def _prepared(slot: Slot, module: nn.Module, activation_form: ActivationForm) -> Any:
    if torch.compiler.is_compiling() or transformed() or MANAGED in vars(module):
        return activation_form.prepare(module)
    if _trains(module):
        _forget(slot)
        return activation_form.prepare(module)
    return slot.prepared(module, activation_form)


def _inner(
    plain: Forward, slot: Slot, module: nn.Module, acting: ActivePlan, route: Route | None = None
) -> Callable[..., Any]:
    """Returns the base forward with what acts inside it: on its tensors, its attributes, its attention."""
    if acting.activation_form is not None:
        return functools.partial(_activation_form, plain, slot, module, acting, acting.activation_form)
    if acting.attention:
        edits, first = Edits(acting.attention, slot, route), acting.attention[0].operator
        assert isinstance(first, AttentionOperator)
        calls = first.calls
        attributes = {**acting.attributes, **calls.attributes(module, edits)}

        def run_view(stand_in: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return calls.run(stand_in, edits, args, kwargs)

        acting = replace(
            acting, attributes=attributes, run_view=run_view, view_class=calls.view_class or acting.view_class
        )
    if acting.effects or acting.attributes or acting.run_view or acting.needs_recompute:
        return functools.partial(_base_call, slot, module, acting)
    return functools.partial(plain, module)


def _around(acting: ActivePlan, call: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    for mount in acting.onion:
        call = mount.around(call, module)
    return call


def _by_rows(
    plain: Forward,
    slot: Slot,
    module: nn.Module,
    planned: ModulePlan,
    route: Route,
    inner: OneForward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run each injection of a route on its own rows, and put the outputs together row by row. Injections that only wrap
    share one base forward. Graphs are the same for all assignments of rows: compiled, each runs on all rows."""
    if not any(acting.effects or acting.onion for acting in planned.routed):
        return inner(*args, **kwargs)
    count = None if torch.compiler.is_compiling() else rows_seen(route, args, kwargs)
    if (updates := _factors(planned.updates, route, module, count)) is not None:
        output = inner(*args, **kwargs)
        return add_updates(updates, route, output, args[0], not torch.is_grad_enabled() and is_linear(inner.run))
    if count is None or planned.acting.attention:  # edits inside take what comes in for all rows of the route
        return _on_all_rows(plain, slot, module, planned, route, inner, args, kwargs)
    acting = {position: _acting(planned.routed[position]) if position >= 0 else None for position in route.present}
    some = _runs_on_some_rows(module)
    if not some and any(each is not None and each.effects for each in acting.values()):
        return _on_all_rows(plain, slot, module, planned, route, inner, args, kwargs)
    alone = tuple(n for n, each in acting.items() if some and each and _wants_rows_alone(each, module, args, kwargs))
    shared, given = route.part(tuple(n for n in acting if n not in alone)), (args, kwargs)
    if alone and shared.positions:  # who changes nothing that goes in has one forward of the base with the others
        given = OwnRows(route.only(alone), (-1,), count).of(given)
    shared_count = count * len(shared.positions) // len(route.positions)
    takes = functools.partial(_form_taken, module, args, kwargs)
    one = _is_one_map(module, args, kwargs)
    groups = positions_alike(acting, route, module, takes) if one else [(position,) for position in acting]
    inside, prepare = functools.partial(_inner, plain, slot, module), functools.partial(_prepared, slot, module)
    parts = {}
    for group in groups:
        rows = OwnRows(route, group, count)
        own = group[0] in alone
        bare = (
            OfSomeRows(inner, (args, kwargs), rows, True)
            if own
            else OfSomeRows(inner, given, OwnRows(shared, group, shared_count))
        )
        first = acting[group[0]]
        draws = route.seeds and first is not None and may_draw(first, takes(first))
        with own_rows(rows, slot.path if draws else None):
            if first is not None and len(group) > 1:
                parts[group] = run_alike([planned.routed[n] for n in group], module, bare, inside, takes, prepare)
            else:
                call = bare if first is None else _alone(plain, slot, module, first, bare)
                parts[group] = call(*bare.args, **bare.kwargs)
    return put_together(parts, route)


def _acting(plan: ActivePlan) -> ActivePlan | None:
    """Returns a plan by which something acts; rows of others are those of the bare base model."""
    return plan if plan.effects or plan.onion else None


def _is_one_map(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a module is called with one tensor, and nothing inside it can tell rows from each other or acts there."""
    whole = not module._modules and MANAGED not in vars(module) and not transformed()
    return whole and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)


PADDING = 0.02
"""The share of the base's product that padding lower ranks may cost, where updates of all adapters are one product."""


def _factors(
    updates: tuple[tuple[int, Mount], ...], route: Route, module: nn.Module, count: int | None
) -> list[tuple[int, Mount, Factors]] | None:
    """Returns the factors of all low-rank updates where these can be added in one product: nothing is dropped, factors
    are parameters, whose gradients cost no product more, hardly any rank is padded, and no single tokens are routed,
    each of which would have factors of its own; otherwise None. Compiled, in evaluation, all are."""
    training, compiling = torch.is_grad_enabled() or module.training, torch.compiler.is_compiling()
    if (
        not updates
        or route.tokens
        or not (compiling or all(mount.operator.factors_are_parameters for _, mount in updates))
    ):
        return None
    if any(mount.operator.training and mount.operator.input_dropout for _, mount in updates):
        return None
    if training if compiling else count is None:
        return None
    found = []
    for position, mount in updates:
        factors = mount.operator.factors()
        if factors is not None:
            found.append((position, mount, factors))
    if compiling:
        return found
    rank_of = {position: len(A) for position, _, (A, _, _) in found}
    ranks = [rank_of.get(position, 0) for position in route.positions]
    A, B, _ = found[0][2]
    padding = sum(max(ranks) - rank for rank in ranks) * (A.shape[1] + len(B))
    return found if padding <= PADDING * len(ranks) * A.shape[1] * len(B) else None


def _wants_rows_alone(acting: ActivePlan, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the bare base model's output for the rows of an injection would be made for nothing."""
    form = _form_taken(module, args, kwargs, acting)
    if form is not None:
        return form.operator.changes_inputs
    return bool(acting.effects) or any(mount.operator.changes_inputs for mount in acting.onion)


def _form_taken(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], acting: ActivePlan
) -> ActivationForm | None:
    """Returns the activation form that an injection of a route takes for its rows; None where it takes none. It does in
    evaluation too, where one forward of the base does for all of them."""
    form = acting.activation_form
    alone = len(args) == 1 and not kwargs and not (acting.low_memory and _trains(module))
    return form if form is not None and alone and form.operator.prefers_activation_form(*args) else None


def _runs_on_some_rows(module: nn.Module) -> bool:
    """Whether a module can run on some rows of a batch by themselves: nothing acts in it, where they would be taken for
    all, and it makes no statistics of batches."""
    inside = [*module.modules()]
    acts_within = any(slot_of(each) is not None for each in inside[1:])
    return not acts_within and not (module.training and any(each._buffers for each in inside))


def _alone(plain: Forward, slot: Slot, module: nn.Module, acting: ActivePlan, bare: OfSomeRows) -> Callable[..., Any]:
    """Returns the forward for the rows of one name alone: in the activation form where there is one, in evaluation too,
    where one forward of the base does for all rows."""
    form = _form_taken(module, bare.args, bare.kwargs, acting)
    if form is not None:
        call = _act_on_activations(bare, slot, module, form)
    else:
        call = _inner(plain, slot, module, replace(acting, attention=())) if acting.effects else bare
    return _around(acting, call, module)


def _on_all_rows(
    plain: Forward,
    slot: Slot,
    module: nn.Module,
    planned: ModulePlan,
    route: Route,
    inner: OneForward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run each injection of a route on all rows, and choose among the outputs row by row."""
    output = inner(*args, **kwargs)
    for position, acting in enumerate(planned.routed):
        if not (acting.effects or acting.onion):
            continue
        call = _inner(plain, slot, module, acting) if acting.effects else inner
        with draws_of(forward_context(), route, position, slot.path, alone=False):
            other = _around(acting, call, module)(*args, **kwargs)
        output = select_rows(output, other, route, position)
    return output


def _composed(
    plain: Forward,
    slot: Slot,
    module: nn.Module,
    planned: ModulePlan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the branches of a composition and combine their outputs. Branches that only wrap share one base forward."""
    assert planned.composition is not None
    shared = Calls(OneForward(_inner(plain, slot, module, ActivePlan(attributes=planned.acting.attributes)), module))
    outputs: dict[int, Any] = {}

    def run(names: tuple[str, ...]) -> Any:
        acting = planned.branches[names]
        if id(acting) not in outputs:
            begin()
            call = _inner(plain, slot, module, acting) if acting.effects or acting.attention else shared
            outputs[id(acting)] = _around(acting, call, module)(*args, **kwargs)
        return outputs[id(acting)]

    with branches(forward_context()) as begin:
        return composed(planned.composition, run, planned.combiners, shared)
