"""The class swap: the only way in which peftcore changes a module of the host.

An adapted module gets a new class: a cached subclass of its class, with the same name. So parameter names,
`isinstance`, signature and tied parameters do not change. The subclass has a different forward. It gets the plan for
the active adapters from the module's slot, and runs a `ModuleCall` with it. A forward that is set on the instance, such
as accelerate's, is replaced too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling

from peftcore.forward.call import Forward, ModuleCall
from peftcore.forward.context.context import HERE, remember_in_checkpoint
from peftcore.forward.state.host_state import HostState
from peftcore.forward.state.slot import Slot, slot_of
from peftcore.layers.layer import GRAFTED, SLOT
from peftcore.layers.pieces import is_cut
from peftcore.utils.journal import Journal

FORWARDS = ("forward", "_old_forward")
"""The instance attributes that may contain a forward: `forward`, and accelerate's copy of the original forward."""


def _grafted_forward(base: type[nn.Module]) -> Callable[..., Any]:
    inputs = list(inspect.signature(base.forward).parameters.values())[1:2]
    first = next((each.name for each in inputs if each.kind is each.POSITIONAL_OR_KEYWORD), None)
    plain: Forward = base.forward  # the function: dynamo does not read it off every class (diffusers' blocks)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot: Slot | None = self.__dict__.get(SLOT)
        if slot is None:
            return plain(self, *args, **kwargs)
        state = slot.state
        if is_dynamo_compiling() or (calm := HERE.calm) is None or calm.state is not state:
            choice = state.entered(self.training)
            planned = slot.plan_for(choice)
            recorded = not is_dynamo_compiling()
        else:  # at a token each step counts
            choice, ahead = calm.choice, slot.planned  # type: ignore[assignment]  # what is calm has a choice
            planned = ahead if ahead is not None and ahead.key is choice.key else slot.plan_for(choice)
            recorded = calm.recorded
        if recorded:
            remember_in_checkpoint(state, choice)
        if not args and first in kwargs:
            args = (kwargs.pop(first),)  # operators get their input by position, however the module was called
        if state.watches_runs and not planned.acting.attention:  # edits mark it themselves: hosts bypass some
            slot.ran[self.training] = True
            if slot.runs is not None:
                slot.runs += 1
        if planned.outermost is not None:
            call: Forward = functools.partial(plain, self)
            for operator in planned.inner:
                call = functools.partial(operator, call)
            return planned.outermost(call, *args, **kwargs)
        of_module = ModuleCall(plain, slot, self, planned, choice.route, args, kwargs)
        return of_module.observed() if planned.acting.observers else of_module.output()

    forward.__qualname__, forward.__doc__ = f"{base.__qualname__}.forward", base.forward.__doc__
    # Not functools.wraps: accelerate unwraps through __wrapped__ and would leave the graft out.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return forward


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def grafted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass of `base` for adapted modules. There is one per class, so that torch.compile and FSDP see
    few types."""
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


def attach(journal: Journal, module: nn.Module, state: HostState) -> Slot:
    """Returns the module's slot. If it is missing, creates it and replaces the module's class."""
    slot = slot_of(module)
    if slot is None:
        slot = Slot(state)
        journal.put(module, "", SLOT, slot)
        journal.put(state, "slots", slot, None)
        become(journal, module, type(module))
    else:
        slot.changed()
    return slot


def detach(journal: Journal, module: nn.Module, state: HostState, name: str) -> None:
    """Remove the operators of this host's injection `name` from a module. After the last one, the module gets its
    original class back."""
    slot = slot_of(module)
    if slot is None or slot.state is not state:
        return
    journal.drop(slot, "mounts", name)
    journal.set(slot, "forced_attributes", [forced for forced in slot.forced_attributes if forced[0] != name])
    slot.changed()
    if not slot.mounts and not slot.forced_attributes:
        ungraft(journal, module)


def ungraft(journal: Journal, module: nn.Module) -> None:
    """Restore the module's original class and remove its slot. The caller must also remove the slot from the host's
    `slots`."""
    plain = vars(type(module)).get(GRAFTED, type(module))
    for cls in (_CLASSES[plain], plain) if plain in _CLASSES else ():
        if type(module) is not cls:  # it is the first one, unless other code has set the plain class alone
            journal.call(change_class, module, type(module), cls)
    journal.drop(module, "", SLOT)


def become(journal: Journal, module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module. An adapted module gets the subclass for adapted modules of the new class."""
    journal.call(change_class, module, type(module), cls if slot_of(module) is None else grafted_class(cls))


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Replace the class of a module. If a forward on the instance is a method of the old class, it becomes the method
    of the new class."""
    before = type(module).forward
    object.__setattr__(module, "__class__", cls)  # torch's own checks whether it is a parameter or a module
    for key in FORWARDS:
        if _is_method(module.__dict__.get(key), before):
            module.__dict__[key] = MethodType(cls.forward, module)
    for cell in _cells(module):
        if _is_method(cell.cell_contents, before):
            cell.cell_contents = MethodType(cls.forward, module)


def _is_method(forward: Any, function: Callable[..., Any]) -> bool:
    return isinstance(forward, MethodType) and forward.__func__ is function


def _cells(module: nn.Module) -> Iterator[CellType]:
    """Yields the closure cells that contain the module's original forward, in a forward that transformers' tensor
    parallelism sets on the instance. Other forwards on instances may not call the original one."""
    forward, weight = module.__dict__.get("forward"), module._parameters.get("weight")
    if isinstance(forward, FunctionType) and weight is not None and is_cut(weight):
        for cell in forward.__closure__ or ():
            with suppress(ValueError):  # an empty one
                if isinstance(cell.cell_contents, MethodType) and cell.cell_contents.__self__ is module:
                    yield cell


def is_reached(module: nn.Module) -> bool:
    """Whether a call of the module reaches the forward of its class. It does so through accelerate's hooks too, which
    set a forward on the instance and call the original one."""
    own = module.__dict__
    if own.keys().isdisjoint(FORWARDS):
        return True  # as nearly always
    forward = type(module).forward
    if any(_is_method(own.get(key), forward) for key in FORWARDS):
        return True
    return any(_is_method(cell.cell_contents, forward) for cell in _cells(module))
