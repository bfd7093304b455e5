"""What holds while the host runs: which injections act, in which thread.

`HostState` is one plain object on the root of an adapted host. The thread that applied the first injection owns it:
what it activates holds for every thread that has not chosen for itself; any other thread chooses for itself alone, so
two threads never meet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from peftcore.errors import UnknownInjection

if TYPE_CHECKING:
    from peftcore.graft import Slot
    from peftcore.injection import Injection

_KEY = "_peftcore_state"
Active = tuple[str, ...]


@dataclass(eq=False)
class HostState:
    """Everything peftcore remembers about one host."""

    injections: dict[str, Injection] = field(default_factory=dict)
    active: Active = ()
    owner: int = field(default_factory=threading.get_ident)
    threads: dict[int, Active] = field(default_factory=dict)
    frozen: list[nn.Parameter] = field(default_factory=list)
    """Parameters whose requires_grad was turned off, to be turned on again when the last injection goes."""

    slots: set[Slot] = field(default_factory=set)
    """Slots of the grafted modules: they plan what acts when it changes, so no compiler ever traces the planning."""

    def current(self) -> Active:
        """The names that act in this thread, in the order in which they were applied.

        While no other thread has chosen, this reads one attribute: torch.compile guards on it, one graph for each
        active set.
        """
        return self.threads.get(threading.get_ident(), self.active) if self.threads else self.active

    def unmerged(self, active: Active) -> Active:
        """Those of `active` whose effect is not in the weights already."""
        return tuple(name for name in active if not self.injections[name].merged)

    def choose(self, active: Iterable[str]) -> None:
        """Set the active names for this thread (for all that did not choose, when this thread is the owner)."""
        wanted = set(active)
        names = tuple(name for name in self.injections if name in wanted)
        ident = threading.get_ident()
        if ident == self.owner:
            self.active = names
            self.replan()
        else:
            self.threads[ident] = names

    def replan(self) -> None:
        """Let every slot plan for the names that are active now."""
        for slot in self.slots:
            slot.plan(self.active)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start with one thread of their own."""
        return {**self.__dict__, "threads": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, owner=threading.get_ident())


def state_of(model: nn.Module) -> HostState | None:
    """The host's state; None when nothing was ever applied."""
    return model.__dict__.get(_KEY)


def ensure_state(model: nn.Module) -> HostState:
    """The host's state, made when missing."""
    state: HostState = model.__dict__.setdefault(_KEY, HostState())
    return state


def drop_state(model: nn.Module) -> None:
    """Forget a host that has no injection left."""
    model.__dict__.pop(_KEY, None)


class Activation(AbstractContextManager["Activation"]):
    """What `activate` returns: already in force; as a context manager it restores what held before."""

    def __init__(self, state: HostState, active: Iterable[str]) -> None:
        self._state = state
        self._mine = state.threads.get(threading.get_ident())
        self._before = state.current()
        state.choose(active)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine is None and threading.get_ident() != self._state.owner:
            self._state.threads.pop(threading.get_ident(), None)  # this thread had not chosen before
        else:
            self._state.choose(self._before)


def injections(model: nn.Module) -> dict[str, Injection]:
    """The host's injections by name, in the order in which they were applied."""
    state = state_of(model)
    return dict(state.injections) if state else {}


def activate(model: nn.Module, *names: str) -> Activation:
    """Make exactly these injections act, in the order in which they were applied; no names: the bare base model.

    Applies at once. The result is also a context manager that restores what held before:

        with activate(model, "summarize"):
            model.generate(...)

    Called in the thread that adapted the host, it holds for all threads that did not choose for themselves; in any
    other thread it holds for that thread alone (use the context manager there). Frozen and trainable parameters stay as
    they are.

    Raises:
        UnknownInjection: the host has no injection of such a name.
    """
    state = state_of(model) or HostState()
    for name in names:
        if name not in state.injections:
            raise UnknownInjection(
                f"no injection named {name!r}; this host has: {', '.join(state.injections) or 'none'}"
            )
    return Activation(state, names)
