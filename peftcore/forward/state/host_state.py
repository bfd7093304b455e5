"""The state of an adapted model: its injections, which of them are active in which threads and tasks, and the open
contexts of forwards.

`HostState` is one plain object on the root module of an adapted host. `peftcore.forward.choice.scopes` determines which
threads and tasks use a choice. A forward that runs inside backward (gradient checkpointing) uses the choice of the
forward that it repeats; see `peftcore.forward.context.context`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from peftcore.contract.installed_methods import Installed
from peftcore.errors import CompositionError, MergeError, UnknownInjection
from peftcore.forward.choice.active_adapters import Active, Choice
from peftcore.forward.choice.merged_choice import check_choice
from peftcore.forward.choice.residency import Residency
from peftcore.forward.choice.scopes import ChoiceBlock, Choices
from peftcore.forward.choice.unused_parameters import check_all_act
from peftcore.forward.context.context import ForwardContext, drop_interrupted, graph_task
from peftcore.forward.state.generate import GeneratesFromCache
from peftcore.forward.state.recorder import Recorder, replayed
from peftcore.layers.adapter_modules import note_lacking
from peftcore.layers.model_locks import changing
from peftcore.libraries.admission import Admitted
from peftcore.libraries.instance_methods import give_methods_back, replace_methods
from peftcore.libraries.save_pretrained import SavesBase
from peftcore.roles.token_tables import token_count
from peftcore.utils.journal import Journal
from peftcore.utils.threads import Token

if TYPE_CHECKING:
    from peftcore.forward.state.slot import Slot

_KEY = "_peftcore_state"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
"""The hook tables of a module in which a `HostState` registers its hooks."""
OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
"""The tables in which torch stores the options of hooks, such as `with_kwargs`."""


class SiteWatcher(Protocol):
    """Checks the adapted sites of a host around each forward."""

    def begin(self, model: nn.Module, state: HostState, acting: Iterable[str]) -> None:
        """Check the modules of the named injections before a forward of the host.

        Raises:
            InactiveSite: as `check`.
        """

    def check(self, model: nn.Module, state: HostState, acting: Iterable[str]) -> None:
        """Check that the modules of the named injections are still in the model.

        Raises:
            InactiveSite: a module is not in the model any more.
        """

    def judge(self, state: HostState, training: bool) -> None:
        """Check, after a forward of the host in this mode, that all active sites ran in it.

        Raises:
            InactiveSite: active sites did not run.
        """


@dataclass(eq=False)
class HostState:
    """The state that peftcore keeps on the root module of one adapted model."""

    injections: dict[str, Installed] = field(default_factory=dict)
    choices: Choices = field(init=False)
    merged: Active = ()
    """The names of the injections that are merged into the weights, in the order of merging."""

    frozen: list[nn.Parameter] = field(default_factory=list)
    """Parameters whose requires_grad was turned off; it is turned on again when the last injection is removed."""

    slots: dict[Slot, None] = field(default_factory=dict)
    """The slots of the adapted modules, in the order of adaptation, which is their order in memory. When the choice
    changes, slots compute their plans at once, so torch.compile never traces this."""

    watched: SiteWatcher | None = None
    """Checks that adapted modules stay in the model and run."""

    watches_runs: bool = True
    """Whether `watched` checks that adapted modules run; False once the host has been compiled."""

    removals: int = 0
    """The number of removed injections: while it does not change, names refer to the same injections in the same
    order."""

    reads_tokens: int = 0
    """The number of injections whose methods read the tokens of a forward."""

    tokens: int = 0
    """The number of rows in the host's token tables when the first adapter was installed; 0 if no token tables are
    known."""

    loaded: Callable[..., None] | None = None
    """The hook that runs after a state dict was loaded into the host."""

    residency: Residency | None = None
    """The object that keeps the values of adapters within a limit of bytes; None without a limit."""

    running: dict[int, ForwardContext] = field(default_factory=dict)
    """The forwards of the host that run now, in all threads, by id; forwards of compiled models are not included."""

    swapping: frozenset[str | None] = frozenset()
    """The injections whose values or operators are being exchanged now, by the thread that holds `swap_lock`. With None
    among them all forwards wait, since tensors of the base are exchanged too."""

    swap_lock: threading.RLock = field(default_factory=threading.RLock)

    recorder: Recorder = field(default_factory=Recorder)
    outside: MutableMapping[Token, ForwardContext] = field(default_factory=weakref.WeakKeyDictionary)
    """By thread, the contexts of parts of the host that the user calls directly. They are stored here, so that they are
    freed with the host."""

    def __post_init__(self) -> None:
        self.choices = Choices(self)

    @property
    def choice(self) -> Choice:
        """The shared choice of active adapters, for threads and tasks that made no choice."""
        return self.choices.choice

    def now(self) -> Choice:
        """Returns the choice of active adapters for this thread or task. If backward repeats a forward, returns the
        choice of the first run."""
        if torch.compiler.is_compiling():
            return self.choices.traced()
        if graph_task() != -1:  # repeating(), at every site and token
            return replayed(self)
        return self.choices.here()

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on the host: opens a forward context. If all injections were removed, the hook is kept as
        long as a thread or task may have chosen one of them, so that its forward raises an error."""
        if not self.injections:
            with changing(model):  # waits while another thread applies an adapter
                if drop_unused(Journal(), model):
                    return
        choice = self.recorder.enter(self, model, args, kwargs)
        if len(self.injections) > 1 and choice is not None:
            check_all_act(model, self.injections, self.unmerged(choice.acting))

    def can_go(self) -> bool:
        """Whether the state of a host without injections can be removed. Three things prevent this: a limit of bytes,
        an open block of another thread or task, and a running forward, because the state has to close its context."""
        return self.residency is None and not self.choices.elsewhere() and not self.running

    @contextmanager
    def exchanging(self, name: str, everyone: bool = False) -> Iterator[list[Choice]]:
        """Context manager in which this thread may change what an injection computes. New forwards that name the
        injection wait until its end; with `everyone`, all new forwards of the host wait. Yields the choices of active
        adapters of the forwards that already run, in all threads."""
        drop_interrupted()
        with self.swap_lock:
            before = self.swapping
            try:
                self.swapping = before | ({name, None} if everyone else {name})
                forwards = [each.choice for each in list(self.running.values()) if each.open]
                yield [] if name in before else [choice for choice in forwards if choice is not None]
            finally:
                self.swapping = before

    def end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook on the host: closes the context, also if the forward raised an exception."""
        return self.recorder.leave(self, model, kwargs, output)

    def entered(self, training: bool) -> Choice:
        """Returns this thread's choice of active adapters for an adapted module that starts to run. `training` is the
        module's mode."""
        choice = self.now()
        if not torch.compiler.is_compiling():
            self.recorder.visit(self, choice, training)
        return choice

    def current(self) -> Active:
        """Returns the names of the injections that act in this thread, in the order in which they were applied."""
        return self.now().acting

    @property
    def made_dense(self) -> list[str]:
        """The paths of quantized modules that are dense as long as injections are merged."""
        return [path for name in self.merged for path in self.injections[name].made_dense]

    @property
    def left_out(self) -> list[str]:
        """The names of injections with trainable parameters that are not merged."""
        found = [name for name in self.injections if name not in self.merged]
        return [name for name in found if any(p.requires_grad for p in self.injections[name].parameters())]

    def unmerged(self, active: Active) -> Active:
        """Returns the names in `active` of injections that are not merged.

        Raises:
            UnknownInjection: one of them was removed.
        """
        for name in active:
            if name not in self.injections:
                raise self._unknown(name)
        return tuple([name for name in active if name not in self.merged]) if self.merged else active

    def check_ready(self, choice: Choice) -> None:
        """Wait, before a forward starts, until other threads have finished exchanging values that it needs. Then
        restore its offloaded adapters: they may have been offloaded while other adapters were active.

        Raises:
            MemoryLimit, CheckpointError: as `Residency.admit`.
        """
        if self.swapping and (None in self.swapping or not self.swapping.isdisjoint(choice.named)):
            with self.swap_lock:
                pass
        if self.residency is not None:
            self.residency.admit(choice)

    def pinned(self, leaving: ChoiceBlock | None) -> set[str]:
        """Returns the names of the adapters that cannot be offloaded: those that are merged, used by a running forward,
        or named by a choice in force. Ignores the choice of the block `leaving`."""
        pinned = {*self.merged}
        for choice in self.choices.pinning(leaving):
            pinned.update(choice.named)
        for context in list(self.running.values()):
            if context.open and context.choice is not None:
                pinned.update(context.choice.named)
        return pinned

    def held(self, choice: Choice) -> AbstractContextManager[None]:
        """Returns a context manager that sets a choice of active adapters only for the code that this thread calls in
        the block."""
        return self.choices.held(choice)

    def note_backward(self) -> None:
        """Record that backward runs through the recorded forwards. The next forward then starts a new record."""
        self.recorder.drained = True

    def kept(self, *names: str) -> AbstractContextManager[None]:
        """Returns a context manager that restores injections on the model and does not offload them until the end of
        the block.

        Raises:
            MemoryLimit, CheckpointError: as `Residency.admit`.
        """
        return nullcontext() if self.residency is None else self.residency.kept(names)

    def check_merged(self, choice: Choice) -> None:
        """Check that forwards with a choice of active adapters compute the right result while injections are merged.

        Raises:
            MergeError: a merged injection would act although the choice excludes it.
        """
        check_choice(self.injections, self.merged, choice)

    def check(self, choice: Choice) -> None:
        """Check that all injections that a choice activates are installed.

        Raises:
            UnknownInjection: one of them was removed.
        """
        here = self.injections
        for name in choice.acting:
            if name not in here:
                raise self._unknown(name)

    def _unknown(self, name: str) -> UnknownInjection:
        return UnknownInjection(f"no injection named {name!r}; this host has: {', '.join(self.injections) or 'none'}")

    def name_of(self, operator: nn.Module) -> str:
        """Returns the name of the injection to which an operator belongs.

        Raises:
            UnknownInjection: the operator belongs to no injection of the host.
        """
        for name, injection in [*self.injections.items()]:
            if any(graft.operator is operator for graft in injection.grafts):
                return name
        raise UnknownInjection(
            f"this {type(operator).__name__} does not belong to an adapter of the model: pass an operator of an "
            "installed adapter"
        )

    def ordered(self, names: Iterable[str]) -> Active:
        """Returns the given names of injections, in the order in which the injections were applied."""
        wanted = set(names)
        return tuple(name for name in [*self.injections] if name in wanted)  # another thread may add one

    def together(self, stack: Active, name: str) -> Active:
        """Returns the injections that are active while a new injection reads data. This is `stack`, or only the new
        injection if it cannot act together with the others."""
        try:
            for slot in [*self.slots]:
                slot.check_stack(stack)
        except CompositionError:
            return (name,)
        return stack

    def replan(self) -> None:
        """Compute the plan of every adapted module for the shared choice."""
        choice = self.choice
        if not all(name in self.injections for name in (*choice.active, *choice.bound)):
            return  # its forward is refused
        with suppress(
            MergeError, CompositionError
        ):  # likewise: a merge outlives its block, a new one overrides another
            for slot in [*self.slots]:  # another thread may add some
                slot.plan(choice)

    def forget(self, journal: Journal, name: str) -> None:
        """Remove an injection from the state, from the choices of this thread or task, and from the shared choice."""
        journal.set(self, "reads_tokens", self.reads_tokens - self.injections[name].reads_tokens)
        journal.drop(self, "injections", name)
        self.removals += 1
        self.choices.forget(name)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and pickles, without running forwards."""
        gone = ("outside", "running", "swap_lock", "residency")
        return {key: value for key, value in self.__dict__.items() if key not in gone} | {"swapping": frozenset()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            state, outside=weakref.WeakKeyDictionary(), running={}, swap_lock=threading.RLock(), residency=None
        )


def state_of(model: nn.Module) -> HostState | None:
    """Returns the host's state; None if no adapter was ever applied."""
    return model.__dict__.get(_KEY)


def ensure_state(
    journal: Journal, model: nn.Module, modules: Collection[nn.Module], loaded: Callable[..., None]
) -> HostState:
    """Returns the host's state, and creates it if it is missing.

    A new state has these effects. Each forward of the host opens a context. `loaded` runs after a state dict was
    loaded. Modules with ``save_pretrained`` save themselves without adapters. ``generate`` computes effective weights
    once per call.
    """
    drop_unused(journal, model)  # a new state has a new owner
    state = state_of(model)
    if state is None:
        state = HostState(tokens=token_count(model), loaded=loaded)
        journal.call(_adapt, model, None, state)
        for kind in (SavesBase, GeneratesFromCache, Admitted):
            replace_methods(journal, modules, kind, state)
    return state


def _adapt(model: nn.Module, state: HostState | None) -> None:
    """Add a state and its hooks to a model, or remove the current ones if `state` is None."""
    if state is None:
        return drop_state(Journal(), model)
    model.__dict__[_KEY] = state
    model.register_forward_pre_hook(state.begin, with_kwargs=True)
    model.register_forward_hook(state.end, with_kwargs=True, always_call=True)
    model.register_load_state_dict_pre_hook(note_lacking)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(state.loaded)  # type: ignore[no-untyped-call]
    return None


def drop_unused(journal: Journal, model: nn.Module) -> bool:
    """Remove the state of a host if it is not needed any more. Returns whether it was removed."""
    state = state_of(model)
    if state is None or state.injections or not state.can_go() or state.choices.around().acting:
        return False
    drop_state(journal, model)
    return True


def drop_state(journal: Journal, model: nn.Module) -> None:
    """Remove the state of a host without injections."""
    state = state_of(model)
    if state is not None:
        mine = (state.begin, state.end, note_lacking, state.loaded)
        for table in HOOKS:
            for key in [key for key, hook in vars(model)[table].items() if getattr(hook, "hook", hook) in mine]:
                for each in (table, *OPTIONS):
                    journal.drop(model, each, key)
        give_methods_back(journal, model, state)
        journal.drop(model, "", _KEY)
        state.outside.clear()
        journal.set(
            state, "frozen", []
        )  # the state and its choices know each other: it goes when Python collects garbage


def known(model: nn.Module, names: Iterable[str]) -> HostState:
    """Returns the host's state, after checking that the host has all injections with the given names.

    Raises:
        UnknownInjection: the host lacks one of the injections.
    """
    state = state_of(model) or HostState()
    for name in names:
        if name not in state.injections:
            raise state._unknown(name)
    return state
