"""Keeps the adapters on the model within a limit of bytes. It offloads the least recently used ones, and restores an
adapter when it is activated again."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from peftcore.contract.installed_methods import AppliedMethod
from peftcore.errors import MemoryLimit

if TYPE_CHECKING:
    from peftcore.forward.choice.active_adapters import Choice
    from peftcore.forward.choice.scopes import ChoiceBlock


class ResidentAdapter(Protocol):
    """An adapter as `Residency` uses it: its values can be offloaded from the model and restored."""

    def bytes(self) -> int:
        """Returns the number of bytes of the adapter's values on the model, also if they are offloaded now."""

    def trains(self) -> bool:
        """Whether the adapter trains, so that an optimizer may change its values."""

    def fetch(self) -> Any:
        """Returns the offloaded values after checking them. The model does not change.

        Raises:
            CheckpointError: the values were changed while offloaded, or are damaged.
        """

    def put_back(self, values: Any) -> None:
        """Restore values on the model, given the result of `fetch`."""

    def take_out(self) -> None:
        """Offload the adapter's values, and free the memory on the model."""

    def is_away(self) -> bool:
        """Whether the adapter's values are offloaded."""

    def forget(self) -> None:
        """Drop the adapter's offloaded values."""


class PinningHost(Protocol):
    """The state of a model, as `Residency` needs it."""

    def pinned(self, leaving: ChoiceBlock | None) -> set[str]:
        """Returns the names of the adapters that cannot be offloaded: those that are merged, used by a running forward,
        or named by a choice in force. Ignores the choice of the block `leaving`."""


class _Record:
    """The record of one adapter: whether its values are on the model, and when it was last used."""

    __slots__ = ("adapter", "here", "used")

    def __init__(self, adapter: ResidentAdapter, used: int) -> None:
        self.adapter, self.here, self.used = adapter, True, used


class Residency:
    """Keeps the values of a model's adapters within a limit of bytes.

    An adapter is pinned (never offloaded) in five cases: a choice in force names it in any thread or task; a running
    forward uses it; it is merged; it trains; or `kept` or `joining` protects it. Threads that use adapters on the model
    need no lock. Such a thread first pins the adapter and then checks that it is on the model, while an offload first
    marks the adapter and then checks for pins.

    Attributes:
        limit: the maximum number of bytes of adapter values on the model.
        lock: held while adapters are offloaded and restored.
    """

    def __init__(self, state: PinningHost, limit: int, account: Callable[[Any], ResidentAdapter]) -> None:
        self._state = weakref.ref(state)
        self.limit, self._account = limit, account
        self.lock = threading.RLock()
        self._records: dict[str, _Record] = {}
        self._held: dict[int, Collection[str]] = {}
        self._clock = itertools.count()

    def names(self, here: bool) -> list[str]:
        """Returns the names of the adapters on the model, or of the offloaded ones if `here` is False. The least
        recently used is first."""
        with self.lock:
            found = [(record.used, name) for name, record in self._records.items() if record.here is here]
        return [name for _, name in sorted(found)]

    def bytes(self) -> int:
        """Returns the total number of bytes of adapter values that are on the model now."""
        with self.lock:
            return sum(record.adapter.bytes() for record in self._records.values() if record.here)

    # ------------------------------------------------------------------------------------- adapters that come and go

    def add(self, injection: AppliedMethod) -> None:
        """Register an injection whose values are on the model.

        Raises:
            UnsupportedHost: the values cannot be offloaded.
        """
        with self.lock:
            self._records[injection.name] = _Record(self._account(injection), next(self._clock))

    @contextmanager
    def joining(self, injection: AppliedMethod) -> Iterator[None]:
        """Context manager for installing a new injection: frees memory for it, and does not offload it until the end of
        the block.

        Raises:
            MemoryLimit: the pinned adapters leave too little memory.
            UnsupportedHost: the injection's values cannot be offloaded.
        """
        adapter = self._account(injection)
        key = next(self._clock)
        try:
            with self.lock:
                self.make_room(adapter.bytes(), repr(injection.name))
                self._held[key] = (injection.name,)
                self._records[injection.name] = _Record(adapter, key)
            yield
        except BaseException:
            self.remove(injection.name)
            raise
        finally:
            self._held.pop(key, None)

    def remove(self, name: str) -> None:
        """Delete the record of an adapter that was removed from the model."""
        with self.lock:
            if (record := self._records.pop(name, None)) is not None:
                record.adapter.forget()

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Context manager that holds the lock while adapters are offloaded and restored. If the block fails, the
        records are corrected to where the values really are. A single offload or restore happens completely or not at
        all."""
        with self.lock:
            try:
                yield
            except BaseException:
                for record in self._records.values():
                    record.here = not record.adapter.is_away()
                raise

    def make_room(self, wanted: int = 0, what: str = "") -> None:
        """Offload adapters until `wanted` bytes are free within the limit. `what` names the adapter in the error
        message.

        Raises:
            MemoryLimit: the pinned adapters take too many bytes.
        """
        with self._moving():
            self._leave(self._victims(wanted, (), what))

    # ----------------------------------------------------------------------------------------------- what is named

    def admit(self, choice: Choice) -> None:
        """Restore the adapters of a choice on the model, and mark them as used now.

        Raises:
            MemoryLimit: they do not fit within the limit together with the pinned adapters.
            CheckpointError: the values of an adapter were changed or damaged while offloaded.
        """
        records = self._records
        for name in choice.named:
            record = records.get(name)
            if record is None:
                continue  # gone: whoever chose it is told so
            if not record.here:
                self.bring(choice.named)
                return
            record.used = next(self._clock)

    def bring(self, names: Collection[str], leaving: ChoiceBlock | None = None) -> None:
        """Restore adapters on the model, as `admit` does.

        Args:
            names: the adapters. Unknown names are ignored.
            leaving: a block whose choice is about to be replaced. The adapters of this choice may be offloaded.
        """
        if torch.compiler.is_compiling():
            return
        with self._moving():
            found = {name: record for name in names if (record := self._records.get(name)) is not None}
            away = {name: record for name, record in found.items() if not record.here}
            for record in found.values():
                record.used = next(self._clock)
            if not away:
                return
            wanted = sum(record.adapter.bytes() for record in away.values())
            victims = self._victims(wanted, names, ", ".join(map(repr, away)), leaving)
            values = [record.adapter.fetch() for record in away.values()]  # checked before anything leaves
            self._leave(victims)
            for record, each in zip(away.values(), values, strict=True):
                record.adapter.put_back(each)
                record.here = True

    def rest(self, names: Iterable[str]) -> list[str]:
        """Offload the given adapters, except for those that are pinned or train. Returns the names of the adapters that
        were not offloaded."""
        with self._moving():
            chosen = {name: self._records[name] for name in names if self._records[name].here}
            for record in chosen.values():
                record.here = False
            pinned = self._pinned(None)
            stay = [name for name, record in chosen.items() if name in pinned or record.adapter.trains()]
            for name in stay:
                chosen.pop(name).here = True
            self._leave(chosen)
            return sorted(stay)

    @contextmanager
    def kept(self, names: Collection[str], leaving: ChoiceBlock | None = None) -> Iterator[None]:
        """Context manager that restores adapters on the model and does not offload them until the end of the block."""
        key = next(self._clock)
        try:
            self._held[key] = names
            for name in names:
                if (record := self._records.get(name)) is not None:
                    record.used = next(self._clock)
                    if not record.here:
                        self.bring(names, leaving)
                        break
            yield
        finally:
            self._held.pop(key, None)

    # ------------------------------------------------------------------------------------------------- who may leave

    def _victims(
        self, wanted: int, keep: Collection[str], what: str, leaving: ChoiceBlock | None = None
    ) -> dict[str, _Record]:
        """Returns the adapters to offload so that `wanted` bytes are free, the least recently used first, and marks
        them as offloaded.

        Raises:
            MemoryLimit: the pinned adapters take too many bytes.
        """
        here = sorted(
            ((name, record) for name, record in self._records.items() if record.here), key=lambda each: each[1].used
        )
        over = sum(record.adapter.bytes() for _, record in here) + wanted - self.limit
        if over <= 0:
            return {}
        candidates = {name: record for name, record in here if name not in keep}
        for record in candidates.values():  # first marked, then asked for pins: see the class
            record.here = False
        pinned = self._pinned(leaving)
        victims: dict[str, _Record] = {}
        for name, record in candidates.items():
            if over <= 0 or name in pinned or record.adapter.trains():  # asked of few: there may be thousands
                record.here = True
            else:
                victims[name] = record
                over -= record.adapter.bytes()
        if over > 0:
            staying = [(name, record) for name, record in here if name not in victims]
            stay, names = sum(record.adapter.bytes() for _, record in staying), [repr(name) for name, _ in staying]
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            taken = f"{stay:,} are taken by adapters that cannot be offloaded now: {', '.join(names[:8])}{more}"
            raise MemoryLimit(
                f"{f'{what} needs {wanted:,} bytes: ' if what else ''}of the {self.limit:,} bytes for adapters "
                f"{taken if names else 'all are free, but they are too few'}. An adapter cannot be offloaded while it "
                "is chosen, trains or is merged: exit the blocks that name it, freeze it (injection.trainable(False)), "
                "or raise pool.limit"
            )
        return victims

    def _leave(self, victims: dict[str, _Record]) -> None:
        for record in victims.values():
            record.adapter.take_out()

    def _pinned(self, leaving: ChoiceBlock | None) -> set[str]:
        """Returns the names of the pinned adapters. Adapters that are pinned only because they train are not
        included."""
        state = self._state()
        assert state is not None, "the state of a model has its residency"
        pinned = state.pinned(leaving)
        for names in list(self._held.values()):
            pinned.update(names)
        return pinned
