"""The one mechanism by which a module of the host is changed.

A grafted site keeps its identity: its class is swapped for a cached subclass of its own class with the same name, so
parameter names, `isinstance`, signature and ties stay as they were. What the subclass adds is one forward:

1. weight operators compute effective tensors, and the base forward runs on a *view*: an object of the base class that
   shares the site's `__dict__` but for those tensors. No flag is set anywhere, so nothing can be left on, raced, or
   read by the wrong reader;
2. onion operators wrap the result, the first applied innermost.

Which operators act is looked up in the host's state at each call and planned once for each active set.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from threading import get_ident
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils.checkpoint import checkpoint

from peftcore.contract.compositions import composed
from peftcore.contract.operators import is_mergeable
from peftcore.forward.attention import attributes
from peftcore.forward.choice import Route
from peftcore.forward.host_state import HostState
from peftcore.forward.recompute import Remade
from peftcore.forward.routing import OfSomeRows, Once, add_updates, each_its_own, select_rows
from peftcore.forward.slot import Acting, Beside, Edits, Planned, Slot
from peftcore.layers.fsdp import MANAGED, whole
from peftcore.layers.kernels import runs_plain, saves_elsewhere, transformed
from peftcore.layers.layer import GRAFTED, Layer, Ranges, is_linear, plain_class, take

_SLOT = "_peftcore_slot"
TORCHS = frozenset(vars(nn.Module()))
"""Attributes that are torch's own."""
FORWARDS = ("forward", "_old_forward")
"""Where a forward may be set on an instance: by anybody, and by accelerate the one that its hook calls."""

Forward = Callable[..., Any]


def slot_of(module: nn.Module) -> Slot | None:
    """The module's slot; None when it is not grafted."""
    return module.__dict__.get(_SLOT)


def view(
    module: nn.Module,
    effective: Mapping[str, Tensor | None],
    attributes: Mapping[str, Any] | None = None,
    cls: type[nn.Module] | None = None,
) -> nn.Module:
    """A stand-in of the plain class (or of `cls`) that shares the module's `__dict__` but for the effective tensors
    (paths may reach into children)."""
    own = {path: tensor for path, tensor in effective.items() if "." not in path}
    parametrized = module._modules.get("parametrizations")
    for name in parametrized._modules if parametrized is not None else ():  # the plain class does not compute them
        own.setdefault(name, getattr(module, name))
    stand_in: nn.Module = object.__new__(cls or plain_class(module))
    fields = {
        key: {} if effective and key not in TORCHS and _is_cache(value) else value
        for key, value in module.__dict__.items()
        if key not in own and key != _SLOT
    }
    fields["_parameters"] = {**module._parameters, **own}
    nested: dict[str, dict[str, Tensor | None]] = {}
    for path, tensor in effective.items():
        child, dot, rest = path.partition(".")
        if dot:
            nested.setdefault(child, {})[rest] = tensor
    if nested:
        children = {child: view(module.get_submodule(child), tensors) for child, tensors in nested.items()}
        fields["_modules"] = {**module._modules, **children}
    stand_in.__dict__.update(fields, **(attributes or {}))
    return stand_in


def _is_cache(value: Any) -> bool:
    """A dictionary of tensors, or one to fill. What a module keeps there comes of its own tensors (LeViT's gathered
    biases), so a view neither reads nor leaves anything in it."""
    return type(value) is dict and all(isinstance(each, Tensor) for each in value.values())


def _on_view(module: nn.Module, acting: Acting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _run_view(module, acting, acting.effective(module), args, kwargs)


def _run_view(
    module: nn.Module,
    acting: Acting,
    tensors: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if acting.product is not None and len(args) == 1 and not kwargs:  # a token: a view takes longer than the product
        bias: Any = tensors.get("bias", module.bias)
        return F.linear(*args, acting.product.logical(tensors["weight"]), bias)
    stand_in = view(module, tensors, acting.attributes, acting.runs_dense)
    return type(stand_in).forward(stand_in, *args, **kwargs)


def _base_call(slot: Slot, module: nn.Module, acting: Acting, *args: Any, **kwargs: Any) -> Any:
    """The base forward on the view. In training the effective weight does not outlive its use: it is computed again in
    backward. Where the module reads what has low-rank updates it is not made at all, unless it is wanted."""
    if not acting.derives or runs_plain():
        return _on_view(module, acting, args, kwargs)
    if not torch.is_grad_enabled():
        return _run_view(module, acting, _without_gradients(slot, module, acting), args, kwargs)
    slot.kept.clear()
    if not (acting.single or MANAGED in vars(module)):
        hooked = saves_elsewhere() or acting.is_cast(module)  # ours would keep things from them, or see no copies
        factors = acting.factors(module)
        if factors is not None or not (acting.frugal or hooked):
            remade = Remade(slot.sources(module, acting))
            tensors = remade.all(acting.makes(module)) if factors is None else acting.stand_ins(module, factors, remade)
            if tensors is not None:
                with nullcontext() if hooked else remade.hooks():
                    return _run_view(module, acting, tensors, args, kwargs)
    return checkpoint(_on_view, module, acting, args, kwargs, use_reentrant=False)


def _without_gradients(slot: Slot, module: nn.Module, acting: Acting) -> Mapping[str, Tensor | None]:
    """What the module reads then: effective tensors, kept in evaluation, or what stands for them."""
    managed = MANAGED in vars(module)
    keeps = not (module.training or acting.packed or acting.frugal or managed)  # copies would undo packing and sharding
    if acting.updates and not managed:
        factors = acting.factors(module) if module.training else slot.factors(module, acting)
        if factors is not None:
            return acting.stand_ins(module, factors, slot.keeping(module, acting) if keeps else _make_now)
    return slot.effective(module, acting) if keeps else acting.effective(module)


def _make_now(path: str, make: Callable[[], Tensor | None]) -> Tensor | None:
    return make()


def _beside(
    plain: Forward, slot: Slot, module: nn.Module, acting: Acting, beside: Beside, *args: Any, **kwargs: Any
) -> Any:
    """What one weight operator does to activations, where that is cheaper. In evaluation it acts on the weight, which
    is kept, unless it may not be, or would be made at each call all the same: under torch.compile."""
    spare = acting.frugal or acting.packed or torch.compiler.is_compiling()
    wanted = not acting.frugal if _trains(module) else spare
    if not (wanted and beside.operator.acts_beside(*args)):
        return _base_call(slot, module, acting, *args, **kwargs)
    return _act_beside(_inner(plain, slot, module, beside.bare), slot, module, beside)(*args, **kwargs)


def _trains(module: nn.Module) -> bool:
    """A checkpoint's first forward has no gradients either, and does what its second does."""
    return torch.is_grad_enabled() or module.training


def _act_beside(inner: Forward, slot: Slot, module: nn.Module, beside: Beside) -> Callable[..., Any]:
    """`inner` with what a weight operator does to activations. What no input changes is kept in evaluation."""
    if torch.compiler.is_compiling() or transformed() or MANAGED in vars(module):
        return beside.around(inner, beside.prepare(module))
    if _trains(module):
        slot.kept.clear()
        return beside.around(inner, beside.prepare(module))
    return beside.around(inner, slot.prepared(module, beside))


def _inner(
    plain: Forward, slot: Slot, module: nn.Module, acting: Acting, route: Route | None = None
) -> Callable[..., Any]:
    """The base forward with what acts inside it: on its tensors, its attributes, its attention."""
    if acting.beside is not None:
        return functools.partial(_beside, plain, slot, module, acting, acting.beside)
    if acting.attention:
        edits = Edits(acting.attention, slot, route)
        acting = replace(acting, attributes={**acting.attributes, **attributes(module, edits)})
    if acting.effects or acting.attributes or acting.derives:
        return functools.partial(_base_call, slot, module, acting)
    return functools.partial(plain, module)


def _around(acting: Acting, call: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    for mount in acting.onion:
        call = mount.around(call, module)
    return call


def _alone(plain: Forward, slot: Slot, module: nn.Module, acting: Acting, bare: OfSomeRows) -> Callable[..., Any]:
    """What acts on the rows of one name alone: beside the weight where it can, in evaluation too, where one forward of
    the base does for all rows."""
    beside, trains = acting.beside, _trains(module)
    if beside is not None and not (acting.frugal and trains) and beside.operator.acts_beside(bare.rows):
        inner = _inner(plain, slot, module, beside.bare) if trains else bare
        call = _act_beside(inner, slot, module, beside)
    else:
        call = _inner(plain, slot, module, acting) if trains or acting.effects else bare
    return _around(acting, call, module)


def _by_rows(
    plain: Forward,
    slot: Slot,
    module: nn.Module,
    planned: Planned,
    route: Route,
    inner: Once,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What each injection of a route computes, put together row by row. Those that only wrap share one base forward.
    Where several act on the weight, which could be kept for one of them, each gets its own rows alone."""
    if planned.apart and len(args) == 1 and not kwargs and len(args[0]) > 1 and not torch.compiler.is_compiling():

        def act(position: int, bare: OfSomeRows) -> Callable[..., Any]:
            return _alone(plain, slot, module, planned.routed[position], bare)

        return each_its_own(route, *args, inner, act)
    output = inner(*args, **kwargs)
    if planned.updates and not torch.is_grad_enabled() and not module.training and len(args[0]) > 1:
        return add_updates(planned.updates, route, output, args[0], is_linear(inner.run))
    for position, acting in enumerate(planned.routed):
        if acting.effects:
            call = _inner(plain, slot, module, replace(acting, attention=()))
            other = _around(acting, call, module)(*args, **kwargs)
        elif acting.onion:
            other = _around(acting, inner, module)(*args, **kwargs)
        else:
            continue
        output = select_rows(output, other, route, position)
    return output


def _composed(
    plain: Forward,
    slot: Slot,
    module: nn.Module,
    planned: Planned,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What the branches of a composition compute, put together. Those that only wrap share one base forward."""
    assert planned.composition is not None
    shared = Once(_inner(plain, slot, module, Acting(attributes=planned.acting.attributes)), module)
    outputs: dict[int, Any] = {}

    def run(names: tuple[str, ...]) -> Any:
        acting = planned.branches[names]
        if id(acting) not in outputs:
            call = _inner(plain, slot, module, acting) if acting.effects or acting.attention else shared
            outputs[id(acting)] = _around(acting, call, module)(*args, **kwargs)
        return outputs[id(acting)]

    return composed(planned.composition, run, planned.combiners)


def _grafted_forward(base: type[nn.Module]) -> Callable[..., Any]:
    inputs = list(inspect.signature(base.forward).parameters.values())[1:2]
    first = next((each.name for each in inputs if each.kind is each.POSITIONAL_OR_KEYWORD), None)
    plain: Forward = base.forward  # the function: dynamo does not read it off every class (diffusers' blocks)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot: Slot | None = self.__dict__.get(_SLOT)
        if slot is None:
            return plain(self, *args, **kwargs)
        state = slot.state
        if is_dynamo_compiling() or state.calm != get_ident() or state.threads:
            choice = state.entered(self.training)
            planned = slot.plan_for(choice)
        else:  # at a token each step counts
            choice, ahead = state.choice, slot.planned
            planned = ahead if ahead is not None and ahead.key is choice.key else slot.plan_for(choice)
        if not args and first in kwargs:
            args = (kwargs.pop(first),)  # operators get what they act on by position, however the module was called
        if planned.outermost is not None:
            if state.witness is not None:
                slot.ran = True
            call: Forward = functools.partial(plain, self)
            for operator in planned.inner:
                call = functools.partial(operator, call)
            return planned.outermost(call, *args, **kwargs)
        if state.witness is not None and not planned.acting.attention:  # edits say it themselves: hosts go round some
            slot.ran = True
        if planned.composition is not None:
            return _composed(plain, slot, self, planned, args, kwargs)
        inner = _inner(plain, slot, self, planned.acting, choice.route)
        if choice.route is not None:
            return _by_rows(plain, slot, self, planned, choice.route, Once(inner, self), args, kwargs)
        return _around(planned.acting, inner, self)(*args, **kwargs)

    forward.__qualname__, forward.__doc__ = f"{base.__qualname__}.forward", base.forward.__doc__
    # Not functools.wraps: accelerate unwraps through __wrapped__ and would leave the graft out.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return forward


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def grafted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass that stands for `base`: one for each class, so that torch.compile and FSDP see few types."""
    if base not in _CLASSES:
        members = {
            GRAFTED: base,
            "forward": _grafted_forward(base),
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            # pickle and deepcopy find the class again through its base
            "__reduce_ex__": lambda self, protocol: (_rebuild, (base,), self.__getstate__()),
        }
        _CLASSES[base] = type(base.__name__, (base,), members)
    return _CLASSES[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = grafted_class(base)
    return cls.__new__(cls)


def attach(module: nn.Module, state: HostState) -> Slot:
    """The module's slot; swaps its class when it has none yet."""
    slot = slot_of(module)
    if slot is None:
        slot = module.__dict__[_SLOT] = Slot(state)
        state.slots[slot] = None
        change_class(module, grafted_class(type(module)))
    else:
        slot.changed()
    return slot


def detach(module: nn.Module, name: str) -> None:
    """Take out what `name` mounted; the module gets its class back with the last mount."""
    slot = slot_of(module)
    if slot is None:
        return
    slot.mounts.pop(name, None)
    slot.stances = [stance for stance in slot.stances if stance[0] != name]
    slot.changed()
    if not slot.mounts and not slot.stances:
        ungraft(module)


def ungraft(module: nn.Module) -> None:
    """Give the module its own class back."""
    slot = module.__dict__.pop(_SLOT, None)
    if slot is not None:
        slot.state.slots.pop(slot, None)
    if GRAFTED in vars(type(module)):
        change_class(module, vars(type(module))[GRAFTED])


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Swap the class, and forwards on the instance that are methods of the old one."""
    before = type(module).forward
    object.__setattr__(module, "__class__", cls)  # torch's own looks whether it is a parameter or a module
    for key in FORWARDS:
        if _is_method(module.__dict__.get(key), before):
            module.__dict__[key] = MethodType(cls.forward, module)


def _is_method(forward: Any, function: Callable[..., Any]) -> bool:
    return isinstance(forward, MethodType) and forward.__func__ is function


def is_reached(module: nn.Module) -> bool:
    """Whether calls arrive at the forward of the module's class: also through accelerate's hooks, which set a forward
    on the instance and keep the one that they call."""
    own = module.__dict__
    if own.keys().isdisjoint(FORWARDS):
        return True  # as nearly always
    return any(_is_method(own.get(key), type(module).forward) for key in FORWARDS)


def effective_weight(module: nn.Module, tensor: str, layer: Layer, rows: Ranges | None) -> Tensor:
    """The logical weight as the injections that act now leave it."""
    stored = layer.read(module, tensor)
    assert stored is not None
    stored = whole(stored)
    slot = slot_of(module)
    if slot is not None:
        active = slot.state.unmerged(slot.state.now().active)
        mounts = [mount for name in active for mount in slot.mounts.get(name, ()) if mount.tensor == tensor]
        with torch.no_grad():
            for mount in mounts:
                stored = mount.effective(stored, stored) if is_mergeable(mount.operator) else stored
    return take(layer.logical(stored), rows, layer.batch_dims)
