"""Installs recorded operators in a model and registers them as an injection; all of it, or nothing on an error."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext

from torch import nn

from peftcore.errors import CompositionError, DuplicateInjection
from peftcore.forward.active_adapters import Active, Choice
from peftcore.forward.host_state import HostState, drop_state, ensure_state, state_of
from peftcore.injection import freezing, made_of_base
from peftcore.injection.injection import Injection
from peftcore.registry.equation_only import notice_equation_only
from peftcore.surgery import silent_layers
from peftcore.surgery.installation import install, release, uninstall
from peftcore.surgery.placement import Placement
from peftcore.surgery.surgeon import Surgeon
from peftcore.training.batches import Data, calibrate


def check_name(model: nn.Module, name: str) -> str:
    """Returns the name, if an injection of this host may have it.

    Raises:
        DuplicateInjection: it is taken, empty, or has a dot.
    """
    state = state_of(model)
    if not name or "." in name or name in dir(nn.Module):
        raise DuplicateInjection(
            f"an injection cannot be called {name!r}: not empty, no dots, no attribute of nn.Module"
        )
    if state is not None and name in state.injections:
        raise DuplicateInjection(
            f"this host already has an injection named {name!r}; give another name=, or remove() it first"
        )
    return name


def establish(
    surgeon: Surgeon,
    name: str,
    data: Data | None = None,
    *,
    active: bool = True,
    instead: Collection[str] = (),
    fill: Callable[[Injection], object] | None = None,
) -> Injection:
    """Install the recorded operators, register the injection with the host, and let the method look at the data, if
    there is any. The injection is active from then on, unless `active` is False, in place of those named in `instead`.

    Args:
        surgeon: what was recorded.
        name: the injection's name.
        data: what the method looks at.
        active: whether it acts.
        instead: the injections that stop to act.
        fill: gives the new injection its values, once it is installed. Where that fails nothing was installed.
    """
    model = surgeon.model
    fresh = state_of(model) is None
    state = begin_state(model, surgeon.resolver.modules.values())
    injection = Injection(name, surgeon, state)
    made_of_base.check_nothing_merged(injection, state)
    with nullcontext() if state.residency is None else state.residency.joining(injection):
        _establish(injection, surgeon, fresh, data, active, instead, fill)
    return injection


def begin_state(model: nn.Module, modules: Collection[nn.Module]) -> HostState:
    """Returns the host's state, made when missing."""
    fresh = state_of(model) is None
    state = ensure_state(model, modules)
    if fresh:
        state.loading.append(model.register_load_state_dict_post_hook(made_of_base.make_anew))  # type: ignore[no-untyped-call]
    return state


def _establish(
    injection: Injection,
    surgeon: Surgeon,
    fresh: bool,
    data: Data | None,
    active: bool,
    instead: Collection[str],
    fill: Callable[[Injection], object] | None,
) -> None:
    model, state, name = injection.model, injection.state, injection.name
    thawed = surgeon.thawed
    choices, before = state.choices, state.choices.saved()
    state.placement = state.placement or Placement()
    state.injections[name] = injection
    state.reads_tokens += injection.reads_tokens
    try:
        state.placement.expect(name, surgeon.grafts)
        install(surgeon, state, name)
        freezing.freeze(thawed)
        if active:
            stack = choices.add(name, instead)
        else:
            stack = (name,)
            state.replan()
        injection.trainable(True)
        made_of_base.note_base(injection)
        silent_layers.watch(surgeon, state, name)
        if data is not None:  # the model that it looks at has it, in a route and a composition too
            with choices.held(Choice(_together(state, stack, name), context=choices.around().context)):
                calibrate(injection, data)
        if fill is not None:
            fill(injection)
    except BaseException:
        silent_layers.forget(state, name)
        state.placement.forget(name)
        del state.injections[name]
        state.reads_tokens -= injection.reads_tokens
        choices.restore(before)
        uninstall(surgeon, state, name)
        state.replan()
        freezing.thaw(thawed)
        if fresh:
            release(model, state)
            drop_state(model)
        raise
    state.frozen += thawed
    surgeon.thawed = []  # held by the state alone: a merge may take them out of the host
    notice_equation_only(each.method for each in surgeon.with_parts())


def _together(state: HostState, stack: Active, name: str) -> Active:
    """Returns the stack with which a new injection looks at data: itself alone, where it cannot act with the others."""
    try:
        for slot in state.slots:
            slot.check_stack(stack)
    except CompositionError:
        return (name,)
    return stack
