"""One call of an adapted module: the base forward with the operators inside and around it, for each row of the batch
and each branch of a composition.

1. Observers see the inputs and the finished output. 2. Input operators change the arguments. 3. Weight operators
compute effective tensors, and the base forward runs with these tensors; or the operators act on activations instead. 4.
Other operators wrap the result, the first applied innermost. 5. A route combines the outputs of its rows, a composition
the outputs of its branches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftcore.contract.calls import Calls
from peftcore.contract.compositions import composed
from peftcore.contract.operators import Factors, InputOperator
from peftcore.forward.attention.attention import AttentionOperator
from peftcore.forward.choice.active_adapters import Active, Route
from peftcore.forward.context.context import HERE, forward_context
from peftcore.forward.context.row_random_numbers import draws_of
from peftcore.forward.context.taps import branches
from peftcore.forward.plan.plan import ActivationForm, ActivePlan, ModulePlan
from peftcore.forward.rows.batched_updates import add_updates
from peftcore.forward.rows.routing import (
    OfSomeRows,
    OneForward,
    OwnRows,
    by_tokens,
    own_rows,
    put_together,
    rows_seen,
    select_rows,
)
from peftcore.forward.rows.stacked_operators import as_one, may_draw, positions_alike
from peftcore.forward.state.slot import Edits, Slot, slot_of
from peftcore.forward.tensors.mount import Mount
from peftcore.forward.tensors.recompute import RecomputedTensors, Unwritten
from peftcore.forward.tensors.view import view
from peftcore.layers.adapter_modules import base_modules, has_submodules
from peftcore.layers.fsdp import MANAGED
from peftcore.layers.kernels import runs_plain, saves_elsewhere, transformed
from peftcore.layers.kinds import is_linear

Forward = Callable[..., Any]


class ModuleCall:
    """One call of one adapted module.

    Args:
        plain: the forward of the module's class.
        slot: the module's slot.
        module: the adapted module.
        plan: the module's plan for the active adapters.
        route: the adapter of each row of the batch; None if all rows use the same adapters.
        args: the module's positional arguments.
        kwargs: the module's keyword arguments.
        acting: the operators of this call, if it is a part of another call (one branch of a composition, or the rows of
            one adapter). By default all operators of the plan.
    """

    __slots__ = ("acting", "args", "edits", "kwargs", "module", "plain", "plan", "route", "slot")

    def __init__(
        self,
        plain: Forward,
        slot: Slot,
        module: nn.Module,
        plan: ModulePlan,
        route: Route | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        acting: ActivePlan | None = None,
    ) -> None:
        self.plain, self.slot, self.module, self.plan, self.route = plain, slot, module, plan, route
        self.args, self.kwargs = args, kwargs
        self.acting = acting = plan.acting if acting is None else acting
        self.edits = Edits(acting.attention, slot, route) if acting.attention else None

    def part(self, acting: ActivePlan, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> ModuleCall:
        """Returns a call with only the operators of `acting`, on the given arguments."""
        return ModuleCall(self.plain, self.slot, self.module, self.plan, None, args, kwargs or {}, acting)

    def observed(self) -> Any:
        """Returns the module's output, and lets observers see the inputs and the output."""
        call: Forward = self.output_for
        for observer in self.acting.observers:
            call = observer.around(call, self.module)
        return call(*self.args, **self.kwargs)

    def output_for(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the module's output for the arguments that an observer passes on."""
        self.args, self.kwargs = args, kwargs
        return self.output()

    def output(self) -> Any:
        """Returns the module's output with all operators but the observers."""
        for mount in self.acting.inputs:
            self._change_inputs(mount)
        if self.plan.composition is not None:
            with self._one_module():
                return self.branches()
        if self.route is None:
            return self.around(self.inner())(*self.args, **self.kwargs)
        with self._one_module():
            if self.route.since is None:
                return self.rows()
            self.route, self.args, self.kwargs, restore = by_tokens(self.route, self.args, self.kwargs)
            return restore(self.rows())

    def _change_inputs(self, mount: Mount) -> None:
        """Let an input operator change the arguments. With a route, it changes only the rows of its adapter."""
        operator, route = mount.operator, self.route
        assert isinstance(operator, InputOperator)

        def mine(like: Tensor) -> Tensor | None:
            return None if route is None else route.of(mount.name, len(like), like.device)

        if route is None or not route.seeds:
            self.args, self.kwargs = operator.change(self.args, self.kwargs, mine)
        else:
            place = f"{self.slot.path}:inputs"
            with draws_of(forward_context(), route, route.names.index(mount.name), place, alone=False):
                self.args, self.kwargs = operator.change(self.args, self.kwargs, mine)

    def _one_module(self) -> AbstractContextManager[None]:
        """Returns the context manager for a module that runs for several adapters one after the other."""
        if torch.compiler.is_compiling() or not HERE.calls:
            return nullcontext()
        return HERE.calls[-1].one_module(self.module, self.args, self.kwargs)

    def around(self, call: Forward, acting: ActivePlan | None = None) -> Forward:
        """Returns `call`, wrapped in the operators that wrap the module: those of this call, or those of `acting`."""
        for mount in (self.acting if acting is None else acting).onion:
            call = mount.around(call, self.module)
        return call

    # The base forward, with what acts on the module's tensors, attributes and attention

    def inner(self) -> Forward:
        """Returns the base forward with the operators that act inside it. Without such operators, this is the module's
        plain forward."""
        acting = self.acting
        if acting.effects or acting.attention or acting.attributes or acting.needs_recompute:
            return self.base
        return functools.partial(self.plain, self.module)

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the base forward with effective tensors (changed by the operators), or of an operator's
        activation form (a forward that leaves the weight unchanged).

        In training, an effective weight is freed after its use, and backward computes it again. If the module can use a
        lazy weight (a stand-in for W + BA), the effective weight is computed only when its values are read.
        """
        acting, module = self.acting, self.module
        if acting.activation_form is not None and self._is_cheaper(acting.activation_form, args):
            form = acting.activation_form
            return form.around(self.part(form.bare).inner(), self.prepared(form))(*args, **kwargs)
        if not acting.needs_recompute or runs_plain():
            return self.on_view(acting.effective(module), args, kwargs)
        if not torch.is_grad_enabled():
            return self.on_view(self._without_gradients(), args, kwargs)
        self._forget()
        if not (acting.linear_only or MANAGED in vars(module)):
            hooked = saves_elsewhere() or acting.is_cast(module)  # ours would keep their tensors, or see no copies
            factors = acting.factors(module)
            if factors is not None or not (acting.low_memory or hooked):
                remade = RecomputedTensors(self.slot.sources(module, acting), self.slot.unwritten(module, acting))
                tensors = (
                    remade.all(acting.makes(module))
                    if factors is None
                    else acting.lazy_weights(module, factors, remade)
                )
                if tensors is not None:
                    with nullcontext() if hooked else remade.hooks():
                        return self.on_view(tensors, args, kwargs)
        inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        before = self.slot.unwritten(module, acting, inputs)
        return checkpoint(self.part(acting)._again, before, args, kwargs, use_reentrant=False)  # a part has no inputs

    def _again(self, before: Unwritten, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before.check()
        return self.on_view(self.acting.effective(self.module), args, kwargs)

    def on_view(self, tensors: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the output of the base forward on a view: an object with the module's attributes and other
        tensors."""
        acting, module, edits = self.acting, self.module, self.edits
        if acting.product is not None and len(args) == 1 and not kwargs:  # a token: a view takes longer
            bias: Any = tensors.get("bias", module.bias)
            return F.linear(*args, acting.product.logical(tensors["weight"]), bias)
        if edits is None:
            stand_in = view(module, tensors, acting.attributes, acting.view_class)
            return type(stand_in).forward(stand_in, *args, **kwargs)
        first = edits.mounts[0].operator
        assert isinstance(first, AttentionOperator)
        attributes = {**acting.attributes, **first.calls.attributes(module, edits)}
        stand_in = view(module, tensors, attributes, first.calls.view_class or acting.view_class)
        return first.calls.run(stand_in, edits, args, kwargs)

    def _without_gradients(self) -> Mapping[str, Tensor | None]:
        """Returns the tensors for a forward without gradients: effective tensors (changed by the operators), or lazy
        weights, which represent W + BA. In evaluation they are read from the open cache, if one is open."""
        acting, module, slot = self.acting, self.module, self.slot
        managed = MANAGED in vars(module)
        keeps = slot.cache is not None and not (
            module.training or acting.packed or acting.low_memory or managed
        )  # dense copies would undo quantization and sharding
        if acting.updates and not managed:
            factors = acting.factors(module) if module.training else slot.factors(module, acting)
            if factors is not None:
                return acting.lazy_weights(module, factors, slot.keeping(module, acting) if keeps else _make_now)
        return slot.effective(module, acting) if keeps else acting.effective(module)

    def _forget(self) -> None:
        """Clear an open cache, because an optimizer step usually follows a forward with gradients."""
        if (cache := self.slot.cache) is not None:
            cache.clear()

    def _is_cheaper(self, form: ActivationForm, args: tuple[Any, ...]) -> bool:
        """Whether to run an operator on activations (its activation form) instead of on the weight. In evaluation with
        an open cache the effective weight is used, which is computed only once, unless it must not be kept."""
        acting = self.acting
        if self._trains():
            wanted = not acting.low_memory
        else:
            wanted = acting.low_memory or acting.packed or torch.compiler.is_compiling() or self.slot.cache is None
        return wanted and not _is_offloaded(form.operator, *args) and form.operator.prefers_activation_form(*args)

    def _trains(self) -> bool:
        """Whether the module trains. In a checkpoint, the first forward runs without gradients and must do the same as
        the second, so a module in training mode counts too."""
        return torch.is_grad_enabled() or self.module.training

    def prepared(self, form: ActivationForm) -> Any:
        """Returns the result of an operator's `prepare` for its activation form (on activations instead of the weight).
        It does not depend on the input, so in evaluation it is read from the open cache."""
        if torch.compiler.is_compiling() or transformed() or MANAGED in vars(self.module):
            return form.prepare(self.module)
        if self._trains():
            self._forget()
            return form.prepare(self.module)
        return self.slot.prepared(self.module, form)

    # Rows of a batch that go to different adapters

    def rows(self) -> Any:
        """Run each adapter of a route on its rows, and combine the outputs row by row.

        Adapters that only wrap the module share one base forward. Compiled graphs must be the same for all assignments
        of rows. So in compiled code each adapter runs on all rows.
        """
        route, args, kwargs, routed = self._route, self.args, self.kwargs, self.plan.routed
        whole = OneForward(self.inner(), self.module)
        if not any(acting.effects or acting.onion for acting in routed):
            return whole(*args, **kwargs)
        count = None if torch.compiler.is_compiling() else rows_seen(route, args, kwargs)
        if (updates := self._factors(count)) is not None:
            output = whole(*args, **kwargs)
            return add_updates(updates, route, output, args[0], not torch.is_grad_enabled() and is_linear(whole.run))
        if count is None or self.acting.attention:  # edits inside take what comes in for all rows of the route
            return self._all_rows(whole)
        acting = {position: _acting(routed[position]) if position >= 0 else None for position in route.present}
        some = _runs_on_some_rows(self.module)
        if not some and any(each is not None and each.effects for each in acting.values()):
            return self._all_rows(whole)
        alone = tuple(n for n, each in acting.items() if some and each and self._wants_rows_alone(each))
        shared, given = route.part(tuple(n for n in acting if n not in alone)), (args, kwargs)
        if alone and shared.positions:  # who changes nothing that goes in has one forward of the base with the others
            given = OwnRows(route.only(alone), (-1,), count).of(given)
        shared_count = count * len(shared.positions) // len(route.positions)
        one = self._is_one_map()
        groups = positions_alike(acting, route, self.module, self.form_taken) if one else [(n,) for n in acting]
        parts = {}
        for group in groups:
            rows = OwnRows(route, group, count)
            bare: Forward = whole.run
            if group[0] in alone:
                own_args, own_kwargs = rows.of((args, kwargs))
            else:
                bare = some_rows = OfSomeRows(whole, given, OwnRows(shared, group, shared_count))
                own_args, own_kwargs = some_rows.given
            first = acting[group[0]]
            draws = route.seeds and first is not None and may_draw(first, self.form_taken(first))
            with own_rows(rows, self.slot.path if draws else None):
                if first is None:
                    parts[group] = bare(*own_args, **own_kwargs)
                elif len(group) > 1:
                    plans = [routed[n] for n in group]
                    run = as_one(plans, self.module, own_args[0], bare, self._inside, self.form_taken, self.prepared)
                    parts[group] = run().flatten(0, 1)
                else:
                    part = self.part(first, own_args, own_kwargs)
                    parts[group] = part._of_its_rows(bare)(*own_args, **own_kwargs)
        return put_together(parts, route)

    @property
    def _route(self) -> Route:
        assert self.route is not None
        return self.route

    def _inside(self, acting: ActivePlan) -> Forward:
        return self.part(acting).inner()

    def _of_its_rows(self, bare: Forward) -> Forward:
        """Returns the forward for the rows of one adapter. If the operator can act on activations instead of the
        weight, it does so, also in evaluation, because then one base forward is enough for all rows."""
        form = self.form_taken(self.acting)
        if form is not None:
            return self.around(form.around(bare, self.prepared(form)))
        return self.around(self.inner() if self.acting.effects else bare)

    def _all_rows(self, whole: OneForward) -> Any:
        """Run each adapter of a route on all rows, and select the output of each row."""
        output = whole(*self.args, **self.kwargs)
        for position, acting in enumerate(self.plan.routed):
            if not (acting.effects or acting.onion):
                continue
            call = self.around(self.part(acting).inner() if acting.effects else whole, acting)
            with draws_of(forward_context(), self._route, position, self.slot.path, alone=False):
                other = call(*self.args, **self.kwargs)
            output = select_rows(output, other, self._route, position)
        return output

    def _factors(self, count: int | None) -> list[tuple[int, Mount, Factors]] | None:
        """Returns the factors of all low-rank updates if one batched product can add them all; otherwise None.

        Conditions: no operator has input dropout; the factors are parameters, so their gradients need no further
        product; few ranks are padded; and the route assigns whole rows, not single tokens. In compiled code, evaluation
        ignores the conditions about parameters and padding, and training returns None.
        """
        updates, compiling = self.plan.updates, torch.compiler.is_compiling()
        if (
            not updates
            or self._route.tokens
            or not (compiling or all(mount.operator.factors_are_parameters for _, mount in updates))
        ):
            return None
        if any(mount.operator.training and mount.operator.input_dropout for _, mount in updates):
            return None
        if self._trains() if compiling else count is None:
            return None
        found = []
        for position, mount in updates:
            factors = mount.operator.factors()
            if factors is not None:
                found.append((position, mount, factors))
        if compiling:
            return found
        rank_of = {position: len(A) for position, _, (A, _, _) in found}
        ranks = [rank_of.get(position, 0) for position in self._route.positions]
        A, B, _ = found[0][2]
        padding = sum(max(ranks) - rank for rank in ranks) * (A.shape[1] + len(B))
        return found if padding <= PADDING * len(ranks) * A.shape[1] * len(B) else None

    def _is_one_map(self) -> bool:
        """Whether equal operators of several adapters can run on this module as one operator. It must be called with a
        single tensor, have no submodules, and not be managed by FSDP."""
        whole = not has_submodules(self.module) and MANAGED not in vars(self.module) and not transformed()
        return whole and len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], Tensor)

    def form_taken(self, acting: ActivePlan) -> ActivationForm | None:
        """Returns the activation form for the rows of one adapter of a route: its operator then acts on activations
        instead of the weight. None if its operators act on the weight. The activation form is used in evaluation too,
        because then one base forward is enough for all adapters."""
        form = acting.activation_form
        alone = len(self.args) == 1 and not self.kwargs and not (acting.low_memory and self._trains())
        return form if form is not None and alone and form.operator.prefers_activation_form(*self.args) else None

    def _wants_rows_alone(self, acting: ActivePlan) -> bool:
        """Whether an adapter does not need the output of the base model for its rows."""
        form = self.form_taken(acting)
        if form is not None:
            return form.operator.changes_inputs
        return bool(acting.effects) or any(mount.operator.changes_inputs for mount in acting.onion)

    # Branches of a composition

    def branches(self) -> Any:
        """Run the branches of a composition and combine their outputs. Branches whose operators only wrap the module
        share one base forward."""
        plan = self.plan
        assert plan.composition is not None
        bare = self.part(ActivePlan(attributes=self.acting.attributes))
        shared = Calls(OneForward(bare.inner(), self.module))
        of_plan: dict[int, Any] = {}
        outputs: dict[Active, Any] = {}
        with branches(forward_context()) as begin:
            for names, acting in plan.branches.items():
                if id(acting) not in of_plan:
                    begin()
                    inside = self.part(acting).inner() if acting.effects or acting.attention else shared
                    of_plan[id(acting)] = self.around(inside, acting)(*self.args, **self.kwargs)
                outputs[names] = of_plan[id(acting)]
            return composed(plan.composition, outputs, plan.combiners, shared)


PADDING = 0.02
"""Lower ranks are padded to the highest rank if one product adds the updates of all adapters. This is the maximum cost
of the padding, relative to the cost of the base product."""


def _make_now(path: str, make: Callable[[], Tensor | None]) -> Tensor | None:
    return make()


def _is_offloaded(operator: nn.Module, x: Tensor) -> bool:
    """Whether accelerate has offloaded the operator's tensors until the operator is called."""
    return not x.is_meta and any(each is not None and each.is_meta for each in operator._parameters.values())


def _acting(plan: ActivePlan) -> ActivePlan | None:
    """Returns the plan if it contains operators, else None, for rows that run the base model."""
    return plan if plan.effects or plan.onion else None


def _runs_on_some_rows(module: nn.Module) -> bool:
    """Whether a module can run on some rows of a batch. It can if no operator acts on its submodules (which would take
    these rows for the whole batch) and it computes no batch statistics."""
    inside = base_modules(module)
    acts_within = any(slot_of(each) is not None for each in inside if each is not module)
    return not acts_within and not (module.training and any(each._buffers for each in inside))
