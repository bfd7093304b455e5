"""Which threads or asyncio tasks use a choice of active adapters, and when it ends.

The choices of one thread or task are stored in a context variable, as an immutable stack for each model. So a task
inherits the choices of the code that started it, and a new thread inherits none. Choices are freed with their thread or
task.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from peftcore.errors import AmbiguousChoice, BlockOrderError, CompositionError, RouteError
from peftcore.forward.choice.active_adapters import Active, Choice
from peftcore.forward.context.context import HERE

if TYPE_CHECKING:
    from peftcore.forward.choice.residency import Residency

_ADVICE = "choose the adapters for one call instead: peftcore.using(model, name)(function, ...)"
_LOCK = threading.RLock()
"""Held while the shared choices change, because garbage collection in another thread may end a block at any time."""

Made = TypeVar("Made")
Place = tuple[object, Any]
"""A pair of a thread and the asyncio task that it runs: a weak reference, or None outside of tasks."""


def running_task() -> Any:
    """Returns the asyncio task that this thread runs; None outside of tasks. Does not import asyncio."""
    asyncio = sys.modules.get("asyncio")
    try:
        return None if asyncio is None else asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


def _place() -> Place:
    task = running_task()
    return HERE.token, None if task is None else weakref.ref(task)


class ChoiceBlock:
    """The time in which a choice of active adapters is in force: a ``with`` block, a call, or the rest of a thread that
    made a choice.

    Attributes:
        choice: the current choice in the block.
        place: the thread and task in which the block began; None if other threads and tasks cannot see the block.
        open: True until the block ends.
        before: the threads that already ran when the block began. Only threads that started later may run code for the
            block. None if threads that started later do not run code for it either.
        of_owner: whether the block is in a task of the thread that adapted the model. Then threads that already ran may
            run code for it too.
        calls: whether the block is a call (`using`), which is in use as long as it is open.
    """

    __slots__ = ("__weakref__", "before", "calls", "choice", "of_owner", "open", "place")

    def __init__(
        self,
        choice: Choice,
        place: Place | None = None,
        before: frozenset[threading.Thread] | None = None,
        of_owner: bool = False,
    ) -> None:
        self.choice, self.place, self.before, self.of_owner = choice, place, before, of_owner
        self.open, self.calls = True, False

    def may_employ(self, thread: threading.Thread) -> bool:
        """Whether a thread that made no choice may run code for this block, so that it may need the block's choice."""
        return self.open and (self.of_owner or (self.before is not None and thread not in self.before))


@dataclass(frozen=True, eq=False, slots=True)
class Scope:
    """A choice of active adapters, with the block in which it was made. Threads and tasks have stacks of scopes."""

    choice: Choice
    block: ChoiceBlock
    pin: ChoiceBlock | None = None
    """A second block, for a choice that a task makes inside a block of another task. It makes the injections of this
    choice visible to other threads."""


Scopes = tuple[Scope, ...]
"""The choices of one thread or task, the innermost last."""


@dataclass(frozen=True, eq=False, slots=True)
class Statement:
    """A choice of active adapters made by `activate`, `route` or `call` without a ``with`` block, and the choices that
    it replaced: the choice before it, and the choices of blocks that ended in other threads or tasks."""

    made: Scope
    before: Scope | None
    over: Scopes


_OWN: ContextVar[Mapping[weakref.ref[Choices], Scopes]] = ContextVar("peftcore_choices", default={})  # noqa: B039  # never written to
_THREAD: ContextVar[object] = ContextVar("peftcore_thread", default=None)
"""The thread in which this context began, if that thread adapted a model or made a choice. `asyncio.to_thread` copies
this value to its thread."""


class ChoosingHost(Protocol):
    """The state of a model, as `Choices` needs it."""

    @property
    def injections(self) -> Container[str]:
        """The names of the installed injections."""

    @property
    def residency(self) -> Residency | None:
        """The object that keeps the values of adapters within a limit of bytes; None without a limit."""

    @property
    def choices(self) -> Choices:
        """The choices on the model."""

    def check(self, choice: Choice) -> None:
        """Raise UnknownInjection if a choice activates an injection that is not installed."""

    def check_merged(self, choice: Choice) -> None:
        """Raise MergeError if a choice excludes a merged injection."""

    def replan(self) -> None:
        """Compute the plan of every adapted module for the shared choice."""


class Choices:
    """All choices of active adapters on one model: the shared choices, and those of single threads and tasks.

    Attributes:
        choice: the shared choice, for all threads and tasks that made none. A plain attribute, because torch.compile
            guards on it.
        own: weak references to the blocks of all threads and tasks that made a choice.
        owner: the thread that adapted the model.
    """

    def __init__(self, host: ChoosingHost) -> None:
        self._begin(host, Choice())

    def _begin(self, host: ChoosingHost, choice: Choice) -> None:
        self._host = weakref.ref(host)  # it has this one: both go at once, not when Python looks for garbage
        self.choice = choice
        self.everybody = [Scope(choice, ChoiceBlock(choice))]
        self.own: dict[int, weakref.ref[ChoiceBlock]] = {}
        self.owner: object = HERE.token
        self.ref = weakref.ref(self)
        _THREAD.set(self.owner)

    @property
    def host(self) -> ChoosingHost:
        """The state of the model to which these choices belong."""
        host = self._host()
        assert host is not None, "nobody has the choices of a model alone"
        return host

    def own_scopes(self) -> Scopes:
        """Returns the stack of choices of this thread or task."""
        return _OWN.get().get(self.ref, ())

    def _live_scopes(self) -> Scopes:
        """Returns the stack of choices of this thread or task. Choices at its end are left out if this thread or task
        entered their block, but other code ended it, such as a generator that was closed elsewhere."""
        scopes = self.own_scopes()
        while scopes and not scopes[-1].block.open and scopes[-1].block.place == _place():
            scopes = scopes[:-1]
        return scopes

    def _open_scopes(self) -> Scopes:
        """Returns the stack of choices of this thread or task, without those at its end whose blocks have ended."""
        scopes = self.own_scopes()
        while scopes and not scopes[-1].block.open:
            scopes = scopes[:-1]
        return scopes

    def here(self) -> Choice:
        """Returns the choice of active adapters for this thread or task.

        Raises:
            BlockOrderError: the choice belongs to a block that has ended in another thread or task.
            AmbiguousChoice: this thread made no choice, and may run code for a block that is open in another thread or
                task.
        """
        if self.own:
            if scopes := self._live_scopes():
                if not scopes[-1].block.open:
                    raise BlockOrderError(
                        "this task (or thread) was started in a block or call that has ended, so its active adapters "
                        f"are not known; wait for it inside the block, or {_ADVICE}"
                    )
                return scopes[-1].choice
            if HERE.token is not self.owner and _THREAD.get() is not self.owner:
                return self._of_a_thread()
        return self.choice

    def _of_a_thread(self) -> Choice:
        """Returns the choice for a thread that made none. If a task of the thread that adapted the model started this
        thread in its block, and it cannot run code for any other task, this is the choice of that task; otherwise the
        shared choice."""
        thread = threading.current_thread()
        blocks = [block for each in list(self.own.values()) if (block := each()) is not None]
        employers = [block for block in blocks if block.may_employ(thread)]
        if not employers:
            return self.choice
        outermost = employers[0]
        if all(block.of_owner and block.place == outermost.place for block in employers) and (
            outermost.before is None or thread not in outermost.before
        ):
            return employers[-1].choice
        raise AmbiguousChoice(
            f"the thread {thread.name!r} has not chosen active adapters, but a block or call that is open in another "
            "thread or task has, and this thread may work for it. Choose here, peftcore.using(model, name)(function, "
            "...), or start the thread with the choice: asyncio.to_thread (keeps the task's choice), or "
            "Thread(target=peftcore.using(model, name), args=(function, ...))"
        )

    def in_force(self) -> Iterator[tuple[str, Choice]]:
        """Yields every choice that a forward may use now, each after a text for error messages that names its owner."""
        mine = {id(each.block) for each in self.own_scopes()}
        yield "", self.around()
        yield "", self.choice
        for key, each in list(self.own.items()):
            block = each()
            if block is not None and block.open and key not in mine:
                yield "in another thread or task ", block.choice

    def pinning(self, leaving: ChoiceBlock | None = None) -> Iterator[Choice]:
        """Yields every choice of active adapters that is in force in any thread or task, and every choice that will be
        again when a ``with`` block ends.

        Args:
            leaving: the block whose choice is about to be replaced. This choice is not included.
        """
        for scope in list(self.everybody):
            if scope.block is not leaving:
                yield scope.choice
        for each in list(self.own.values()):
            block = each()
            if block is not None and block.open and block is not leaving:
                yield block.choice

    def called(self) -> Iterator[Choice]:
        """Yields the choices of the calls (`using`) that run in all threads."""
        for each in list(self.own.values()):
            block = each()
            if block is not None and block.open and block.calls:
                yield block.choice

    def traced(self) -> Choice:
        """Returns the choice of active adapters for this thread or task, in code that torch.compile traces.

        The compiler guards on the attributes that are read here, and makes one graph for each active set. Reading a
        context variable would break the graph.
        """
        call = HERE.traced
        if call is not None and call[0] is self:
            return call[1]
        return self.choice if not self.own else self.here()

    def around(self) -> Choice:
        """Returns the choice of active adapters on which a new choice of this thread or task is based. It raises no
        error."""
        scopes = self._open_scopes()
        return scopes[-1].choice if scopes else self.choice

    # ------------------------------------------------------------------------------------------ statements and blocks

    def set(self, choice: Choice) -> Statement:
        """Set a choice of active adapters until the end of the enclosing block or call. In the thread that adapted the
        model, it becomes the shared choice, unless this thread or task already made a choice. In any other thread it
        applies to that thread."""
        return self._begun(self._set, choice, self._replaced())

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Context manager that restores the choices and plans if its block raises an exception, also for Ctrl-C."""
        saved = self.saved()
        try:
            yield
        except BaseException:
            self.restore(saved)
            self.host.replan()
            raise

    def _replaced(self) -> ChoiceBlock | None:
        """Returns the block whose choice `set` would replace; None if it would replace none."""
        if scopes := self._open_scopes():
            return scopes[-1].block
        return self.everybody[-1].block if HERE.token is self.owner else None

    def _begun(self, begin: Callable[[Choice], Made], choice: Choice, replaced: ChoiceBlock | None = None) -> Made:
        """Returns the result of `begin`, which sets a choice. No thread can merge between the check and the choice."""
        self.host.check_merged(choice)  # before other adapters leave for those that the choice names
        residency = self.host.residency
        with self._whole(), nullcontext() if residency is None else residency.kept(choice.named, replaced):
            with _LOCK:
                self.host.check_merged(choice)
                made = begin(choice)
                published = self._make_current()
            if published:
                self.host.replan()
            return made

    def _set(self, choice: Choice) -> Statement:
        _disturb()
        scopes = self._open_scopes()
        over = self.own_scopes()[len(scopes) :]
        if scopes:
            before = scopes[-1]
            inherited = before.block.place is not None and before.block.place != _place()
            made = Scope(choice, before.block, self._enlisted(ChoiceBlock(choice)) if inherited else None)
            self._write((*scopes[:-1], made))
            return Statement(made, before, over)
        if HERE.token is not self.owner:
            made = Scope(choice, self._enlisted(ChoiceBlock(choice, _place())))
            self._write((made,))
            return Statement(made, None, over)
        if over:
            self._write(())
        _THREAD.set(self.owner)
        before = self.everybody[-1]
        made = self.everybody[-1] = Scope(choice, before.block)
        return Statement(made, before, over)

    def undo(self, statement: Statement) -> None:
        """Undo a statement (the result of `set`), unless another choice was made since."""
        made, before = statement.made, statement.before
        if before is not None:
            before = Scope(self._present(before.choice), before.block)
        kept = [] if before is None else [before]
        scopes = self.own_scopes()
        for index, each in enumerate(scopes):
            if each is made:
                self._write((*scopes[:index], *kept, *statement.over, *scopes[index + 1 :]))
                return
        with _LOCK:
            for index, each in enumerate(self.everybody):
                if each is made and before is not None:
                    self.everybody[index] = before
                    self._write((*statement.over, *scopes))
        self._publish()

    def open(self, choice: Choice) -> ChoiceBlock:
        """Set a choice of active adapters until `leave` is called with the returned block. In the thread that adapted
        the model, it becomes the shared choice, unless this thread already made a choice or runs a task. Otherwise it
        applies only to this thread or task."""
        return self._begun(self._open, choice)

    def _open(self, choice: Choice) -> ChoiceBlock:
        _disturb()
        scopes, place = self._live_scopes(), _place()
        owned = HERE.token is self.owner
        if owned and place[1] is None and not scopes:
            block = ChoiceBlock(choice, place)
            self.everybody.append(Scope(choice, block))
            return block
        block = self._enlisted(
            ChoiceBlock(choice, place, frozenset(threading.enumerate()), owned and place[1] is not None)
        )
        self._write((*scopes, Scope(choice, block)))
        return block

    @contextmanager
    def block(self, choice: Choice) -> Iterator[None]:
        """Context manager that sets a choice of active adapters until the end of the block. It applies to the same
        threads and tasks as in a ``with`` block of `activate`."""
        block = None
        try:
            block = self.open(choice)
            yield
        finally:
            if block is not None:
                self.leave(block)

    def leave(self, block: ChoiceBlock) -> None:
        """End a block: the choice of the enclosing block is in force again.

        Raises:
            BlockOrderError: a block that was entered later is still open, or this thread or task never entered this
                block. The block ends in any case.
        """
        _disturb()
        self._end(block)

    @contextmanager
    def held(self, choice: Choice, before: frozenset[threading.Thread] | None = None) -> Iterator[None]:
        """Context manager that sets a choice of active adapters only for the code that this thread calls in the
        block."""
        with _LOCK:  # as in `_begun`
            self.host.check_merged(choice)
            block = self._enlisted(ChoiceBlock(choice, _place(), before))
        block.calls = True
        scopes, traced = self._live_scopes(), HERE.traced
        try:
            self._write((*scopes, Scope(choice, block)))
            if (residency := self.host.residency) is not None:  # after it is in force: what it names stays from here on
                residency.admit(choice)
            HERE.traced, HERE.calm = (self, choice), None
            yield
        finally:
            HERE.traced = traced
            try:
                if any(each.block is block for each in self.own_scopes()):  # else it was interrupted before
                    self._end(block)
            finally:
                HERE.settle()

    def _end(self, block: ChoiceBlock) -> None:
        block.open, block.before = False, None
        scopes = self.own_scopes()
        later = _later(scopes, block)
        if later is not None:
            self._write((*scopes[: len(scopes) - len(later) - 1], *(each for each in later if each.block.open)))
        else:
            later = _later(tuple(self.everybody), block)
            self._publish()
        if later is None:
            raise BlockOrderError(
                "a block ended in another task or thread than it began in (a generator or fixture was closed "
                f"elsewhere), so forwards in between may have used another choice; {_ADVICE}"
            )
        if any(each.block.open for each in later):
            raise BlockOrderError(
                "a block ended while a block entered later is still open, so forwards in between may have used the "
                f"wrong choice; {_ADVICE}"
            )

    def _enlisted(self, block: ChoiceBlock) -> ChoiceBlock:
        own, key = self.own, id(block)
        own[key] = weakref.ref(block, lambda _: own.pop(key, None))
        return block

    def _write(self, scopes: Iterable[Scope]) -> None:
        """Set the stack of choices of this thread or task, and delete stacks of models that no longer exist."""
        scopes = tuple(scopes)
        others = {ref: each for ref, each in _OWN.get().items() if ref is not self.ref and ref() is not None}
        _OWN.set({**others, self.ref: scopes} if scopes else others)
        if scopes:
            block, choice = scopes[-1].block, scopes[-1].choice
            if block.choice is not choice and block.place == _place():  # not of a task that inherited the block
                block.choice = choice

    def _publish(self) -> None:
        """Make the innermost shared choice the current one, and compute the plans for it."""
        with _LOCK:
            published = self._make_current()
        if published:
            self.host.replan()

    def _make_current(self) -> bool:
        """Make the innermost shared choice the current one. The caller holds `_LOCK`. Returns whether the current
        choice changed."""
        self.everybody[1:] = [each for each in self.everybody[1:] if each.block.open]
        choice = self.everybody[-1].choice
        if choice is self.choice:
            return False
        self.choice = choice
        return True

    @staticmethod
    def unchanged() -> AbstractContextManager[object]:
        """Returns a context manager that prevents other threads from setting choices of active adapters."""
        return _LOCK

    # ----------------------------------------------------------------------------------- injections that come and go

    def add(self, name: str, instead: Collection[str] = ()) -> Active:
        """Activate a new injection in the innermost choice without a route or composition. Routes and compositions do
        not change. If such a choice is missing, the injection is inactive until a choice names it.

        Args:
            name: the new injection.
            instead: injections to deactivate there.

        Returns:
            The names that are then active there, the new one included.
        """
        _disturb()
        with _LOCK:
            scopes, everybody, stack = self._joining(name, instead)
            if len(scopes) > len(self._open_scopes()):
                self._enlisted(scopes[0].block)
            self._write(scopes)
            self.everybody[:] = everybody
            self._make_current()
        self.host.replan()
        return stack

    def joined(self, name: str, instead: Collection[str] = ()) -> Active:
        """Returns the names that `add` would return, without changing anything."""
        return self._joining(name, instead)[2]

    def _joining(self, name: str, instead: Collection[str]) -> tuple[list[Scope], list[Scope], Active]:
        """Returns three items with a new injection added: the scopes of this thread or task, the shared scopes, and the
        result of `add`."""
        scopes, everybody, owned = list(self._open_scopes()), list(self.everybody), HERE.token is self.owner
        if not owned and not any(_is_stack(each.choice) for each in scopes) and _is_stack(self.choice):
            scopes.insert(0, Scope(self.choice, ChoiceBlock(self.choice, _place())))
        stack = _joined(scopes, name, instead)
        if stack is None and owned:
            stack = _joined(everybody, name, instead)
        return scopes, everybody, (name,) if stack is None else stack

    def check_free(self, names: Iterable[str]) -> None:
        """Check that injections may be removed.

        Raises:
            RouteError, CompositionError: a route or a composition names one of the injections. Only shared ones and
                those of this thread or task are checked.
        """
        wanted = set(names)
        for each in (*self._open_scopes(), *self.everybody):
            for name in wanted.intersection(each.choice.bound):
                kind = CompositionError if each.choice.route is None else RouteError
                what = "composition" if each.choice.route is None else "route"
                raise kind(
                    f"{name!r} is part of a {what} that is in force and cannot be removed: exit the {what} first"
                )

    def forget(self, name: str) -> None:
        """Deactivate a removed injection in the choices of this thread or task, and in the shared choice. Choices of
        other threads and tasks still contain it, so their next forward raises an error."""
        _disturb()
        scopes = self.own_scopes()
        if any(name in each.choice.active for each in scopes):
            self._write([Scope(each.choice.without(name), each.block) for each in scopes])
        with _LOCK:
            last = len(self.everybody) if HERE.token is self.owner else 1
            for index, each in enumerate(self.everybody[:last]):
                if name in each.choice.active:
                    self.everybody[index] = Scope(each.choice.without(name), each.block)
        self._publish()
        self.host.replan()

    def saved(self, shared: int = 0) -> tuple[Scopes, Scopes]:
        """Returns the choices that this thread or task can change, as the argument of `restore`. In a thread that did
        not adapt the model, it includes only the first `shared` shared choices, which `forget` may change."""
        return self.own_scopes(), tuple(self.everybody if HERE.token is self.owner else self.everybody[:shared])

    def restore(self, saved: tuple[Scopes, Scopes]) -> None:
        """Restore the choices that `saved` returned. Injections that another thread has removed since are left out of
        shared choices. Does not compute plans."""
        _disturb()
        self._write(saved[0])
        if saved[1]:
            with _LOCK:
                end = len(self.everybody if HERE.token is self.owner else saved[1])  # others' are not in what was saved
                self.everybody[:end] = map(self._of_present, saved[1])
                self.choice = self.everybody[-1].choice

    def elsewhere(self) -> bool:
        """Whether other threads or tasks have open blocks, which may name removed injections."""
        mine = {id(each.block) for each in self.own_scopes()}
        return (HERE.token is not self.owner and len(self.everybody) > 1) or bool(self.own.keys() - mine)

    def _of_present(self, scope: Scope) -> Scope:
        choice = self._present(scope.choice)
        return scope if choice is scope.choice else Scope(choice, scope.block)

    def _present(self, choice: Choice) -> Choice:
        for name in choice.active:
            if name not in self.host.injections:
                choice = replace(choice, active=tuple([each for each in choice.active if each != name]))
        return choice

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and pickles. A copy has the active injections of this thread or task for all
        threads, without a route."""
        choice = self._present(self.around())
        return {"host": self.host, "choice": Choice(choice.active, composition=choice.composition)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(state["host"], state["choice"])


def _disturb() -> None:
    HERE.disturb()
    HERE.traced = None


def _is_stack(choice: Choice) -> bool:
    return choice.route is None and choice.composition is None


def _later(scopes: Scopes, block: ChoiceBlock) -> Scopes | None:
    """Returns the scopes that were added after the scope of a block; None if the block lacks a scope among them."""
    return next((scopes[index + 1 :] for index, each in enumerate(scopes) if each.block is block), None)


def _joined(scopes: list[Scope], name: str, instead: Collection[str]) -> Active | None:
    """Add a name to the innermost choice without a route or composition, in place. Returns the names that are then
    active there; None if such a choice is missing."""
    for index in reversed(range(len(scopes))):
        choice, block = scopes[index].choice, scopes[index].block
        if choice.composition is not None:
            continue
        stack = (*(each for each in choice.active if each not in instead), name)
        scopes[index] = Scope(replace(choice, active=stack), block)
        if choice.route is None:
            return stack
    return None


class Chosen(AbstractContextManager["Chosen"]):
    """The result of `activate`, `route` and `call`, whose choice of active adapters is already in force. If it is used
    as a context manager, the choice ends with the block. Then the previous choice is in force again."""

    def __init__(self, state: ChoosingHost, choice: Choice) -> None:
        self._state, self._choice = state, choice
        self._blocks: list[ChoiceBlock] = []
        self._statement: Statement | None = state.choices.set(choice)  # last: nothing is interrupted after it

    def __enter__(self) -> Chosen:
        entered, state = len(self._blocks), self._state
        before = None if self._statement is None else self._statement.before
        try:
            state.check(self._choice)
            self._blocks.append(state.choices.open(self._choice))
            self._take_back()
            self._bring(before)
            return self
        except BaseException:
            if len(self._blocks) > entered:
                state.choices.leave(self._blocks.pop())
            self._take_back()
            self._bring(before)
            raise

    def _bring(self, before: Scope | None) -> None:
        """Restore the adapters of the replaced choice on the model. They may have been offloaded for the new choice,
        and are needed again after the block."""
        if self._state.residency is not None and before is not None:
            self._state.residency.bring(before.choice.named)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._blocks:
            self._state.choices.leave(self._blocks.pop())
        else:
            self._take_back()

    def _take_back(self) -> None:
        if self._statement is not None:
            self._state.choices.undo(self._statement)
            self._statement = None
