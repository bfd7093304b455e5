"""The state of an adapted model: its injections, which of them are active in which thread, and the open forward
context.

`HostState` is one plain object on the root of an adapted host. The thread that applied the first injection owns it:
what it chooses holds for every thread that has not chosen for itself; any other thread chooses for itself alone, so
two threads never meet. A forward that runs inside backward (gradient checkpointing) follows the choice of the forward
that it repeats; see `peftcore.forward.context`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peftcore.errors import UnknownInjection
from peftcore.forward.active_adapters import Active, Choice
from peftcore.forward.adapter_modules import note_lacking
from peftcore.forward.context import ForwardContext, Recorder, graph_task, replayed
from peftcore.forward.generate import GeneratesFromCache
from peftcore.forward.instance_methods import give_methods_back, replace_methods
from peftcore.forward.save_pretrained import SavesBase
from peftcore.roles.token_tables import token_count

if TYPE_CHECKING:
    from peftcore.forward.slot import Slot
    from peftcore.injection.injection import Injection
    from peftcore.surgery.placement import Placement
    from peftcore.surgery.silent_layers import SilentLayers

_KEY = "_peftcore_state"


@dataclass(eq=False)
class HostState:
    """The state that peftcore keeps on the root module of one adapted model."""

    injections: dict[str, Injection] = field(default_factory=dict)
    choice: Choice = field(default_factory=Choice)
    owner: int = field(default_factory=threading.get_ident)
    threads: dict[int, Choice] = field(default_factory=dict)
    frozen: list[nn.Parameter] = field(default_factory=list)
    """Parameters whose requires_grad was turned off, to be turned on again when the last injection goes."""

    slots: dict[Slot, None] = field(default_factory=dict)
    """Slots of the grafted modules, in the order in which they came, which is how they lie in memory: they plan what
    acts when it changes, so no compiler ever traces the planning."""

    placement: Placement | None = None
    """Watches that adapted modules stay in the model."""

    silent_layers: SilentLayers | None = None
    """Watches that adapted sites run, until the host is compiled."""

    calm: int | None = None
    """The thread in which a forward of the host runs by the owner's choice: its modules need not ask what was chosen,
    unless somebody chooses for a thread alone."""

    recorded: bool = True
    """Whether backward may repeat that forward."""

    tokens: int = 0
    """The rows that the host's token tables had when the first adapter came; 0 of a host that names none."""

    loading: RemovableHandle | None = None
    """Of the hook by which a state dict that lacks adapters is not loaded as a whole one."""

    recorder: Recorder = field(default_factory=Recorder)
    outside: dict[int, ForwardContext] = field(default_factory=dict)
    """By thread: the forward context of parts that run without the host. Held here, so that it ends with the host."""

    @property
    def active(self) -> Active:
        """The names that are active in every thread that did not choose for itself."""
        return self.choice.active

    def now(self) -> Choice:
        """Returns the choice of this thread; in a forward repeated inside backward, the choice that the first run saw.

        While no other thread has chosen, this reads one attribute: torch.compile guards on it, one graph for each
        active set.
        """
        if not torch.compiler.is_compiling() and graph_task() != -1:  # repeating(), at every site and token
            return replayed(self)
        return self.threads.get(threading.get_ident(), self.choice) if self.threads else self.choice

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on the host: opens a forward context."""
        self.recorder.enter(self, model, args, kwargs)

    def end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook on the host: closes the context, also when the forward raised."""
        return self.recorder.leave(self, model, kwargs, output)

    def entered(self, training: bool) -> Choice:
        """Returns this thread's choice for a grafted module that starts to run; `training` is the module's mode."""
        choice = self.now()
        if not torch.compiler.is_compiling():
            self.recorder.visit(self, choice, training)
        return choice

    def current(self) -> Active:
        """Returns the names that act in this thread, in the order in which they were applied."""
        return self.now().acting

    def unmerged(self, active: Active) -> Active:
        """Returns the names of `active` that are not merged into the weights."""
        return tuple([name for name in active if not self.injections[name].merged])

    def choose(self, active: Iterable[str]) -> None:
        """Set the active names for this thread (for all that did not choose, when this thread is the owner)."""
        wanted = set(active)
        names = tuple(name for name in self.injections if name in wanted)
        self.set(Choice(names, None, self.now().context))

    def set(self, choice: Choice) -> None:
        """Set the choice of this thread (of all that did not choose, when this thread is the owner)."""
        ident = threading.get_ident()
        if ident == self.owner and ident not in self.threads:
            self.choice = choice
            self.replan()
        else:
            self.threads[ident] = choice

    def replan(self) -> None:
        """Let every slot plan for the current choice."""
        for slot in self.slots:
            slot.plan(self.choice)

    def forget(self, name: str) -> None:
        """Drop an injection from the state and from every choice that names it."""
        del self.injections[name]

        def without(choice: Choice) -> Choice:
            route = choice.route if choice.route is None or name not in choice.route.names else None
            composition = None if name in choice.active else choice.composition
            return Choice(tuple(each for each in choice.active if each != name), route, choice.context, composition)

        self.choice = without(self.choice)
        self.threads = {ident: without(choice) for ident, choice in self.threads.items()}
        self.replan()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and pickles, which start with one thread of their own and without a route."""
        choice = Choice(self.choice.active, composition=self.choice.composition)
        return {**self.__dict__, "threads": {}, "outside": {}, "choice": choice, "calm": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, owner=threading.get_ident())


def state_of(model: nn.Module) -> HostState | None:
    """Returns the host's state; None when nothing was ever applied."""
    return model.__dict__.get(_KEY)


def ensure_state(model: nn.Module, modules: Collection[nn.Module]) -> HostState:
    """Returns the host's state, made when missing. Then each forward of the host opens a context, the modules that have
    ``save_pretrained`` save themselves without adapters, and ``generate`` computes effective weights once in a call."""
    state = state_of(model)
    if state is None:
        state = model.__dict__[_KEY] = HostState(tokens=token_count(model))
        model.register_forward_pre_hook(state.begin, with_kwargs=True)
        model.register_forward_hook(state.end, with_kwargs=True, always_call=True)
        state.loading = model.register_load_state_dict_pre_hook(note_lacking)  # type: ignore[no-untyped-call]
        for kind in (SavesBase, GeneratesFromCache):
            replace_methods(modules, kind, state)
    return state


def drop_state(model: nn.Module) -> None:
    """Remove the state of a host that has no injection left."""
    state = model.__dict__.pop(_KEY, None)
    if state is not None:
        _unhook(model, state)
        if state.loading is not None:
            state.loading.remove()
        state.outside.clear()
        give_methods_back(model, state)


def _unhook(model: nn.Module, state: HostState) -> None:
    for hooks, mine, notes in (
        (model._forward_pre_hooks, state.begin, (model._forward_pre_hooks_with_kwargs,)),
        (model._forward_hooks, state.end, (model._forward_hooks_with_kwargs, model._forward_hooks_always_called)),
    ):
        for key in [key for key, hook in hooks.items() if hook == mine]:
            del hooks[key]
            for note in notes:
                note.pop(key, None)


class Chosen(AbstractContextManager["Chosen"]):
    """Returned by `activate`, `route` and `call`: the choice is in force already; as a context manager it restores the
    earlier one."""

    def __init__(self, state: HostState, choice: Choice) -> None:
        self._state = state
        self._mine = state.threads.get(threading.get_ident())
        self._before = state.now()
        state.set(choice)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine is None and threading.get_ident() != self._state.owner:
            self._state.threads.pop(threading.get_ident(), None)  # this thread had not chosen before
        else:
            self._state.set(self._alive(self._before))

    def _alive(self, choice: Choice) -> Choice:
        """Returns the choice without injections that were removed meanwhile."""
        here = self._state.injections
        gone = choice.route is not None and any(name not in here for name in choice.route.names)
        active = tuple(name for name in choice.active if name in here)
        return choice if active == choice.active and not gone else Choice(active, None, choice.context)


def chosen(state: HostState, active: Iterable[str]) -> Chosen:
    """Choose these names, in the order in which they were applied."""
    wanted = set(active)
    names = tuple(name for name in state.injections if name in wanted)
    return Chosen(state, Choice(names, None, state.now().context))


def injections(model: nn.Module) -> dict[str, Injection]:
    """Returns the host's injections by name, in the order in which they were applied."""
    state = state_of(model)
    return dict(state.injections) if state else {}


def known(model: nn.Module, names: Iterable[str]) -> HostState:
    """Returns the host's state, when it has injections of all these names.

    Raises:
        UnknownInjection: it lacks one.
    """
    state = state_of(model) or HostState()
    for name in names:
        if name not in state.injections:
            raise UnknownInjection(
                f"no injection named {name!r}; this host has: {', '.join(state.injections) or 'none'}"
            )
    return state
