"""Random histories of an adapted model in which operations of torch fail. After each, outputs are those of before or
of after (`history_machine`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import hypothesis.strategies as st
import torch
from history_machine import METHODS, History, names
from history_world import case_of
from hypothesis.stateful import rule
from torch.utils._python_dispatch import TorchDispatchMode

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.testing import NotApplicable

FAULTS: dict[str, Callable[[], BaseException]] = {
    "RuntimeError": lambda: RuntimeError("this operation of torch fails"),
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("no memory for this operation"),
    "KeyboardInterrupt": KeyboardInterrupt,
}
CHANGES: dict[str, Callable[[peftcore.Injection], object]] = {
    "merge": lambda injection: injection.merge(),
    "unmerge": lambda injection: injection.unmerge(),
    "remove": lambda injection: injection.remove(),
    "trainable": lambda injection: injection.trainable(),
    "swap": lambda injection: injection.swap({key: value.clone() for key, value in injection.state_dict().items()}),
}


class FailsAt(TorchDispatchMode):
    """The operation of torch of this number raises an error."""

    def __init__(self, at: int, error: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left, self.error = at, error

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise FAULTS[self.error]()
        return function(*args, **(kwargs or {}))


@contextmanager
def fails(at: int, error: str) -> Iterator[None]:
    """Context manager in which an operation of torch fails, if there are so many; or the step is refused."""
    with suppress(PeftcoreError, NotApplicable, type(FAULTS[error]())), FailsAt(at, error):
        yield


class FaultyHistory(History):
    """One random history with faults."""

    @contextmanager
    def failing(self, at: int, error: str) -> Iterator[None]:
        """Context manager in which an operation of torch fails, which the script says."""
        assert self.script is not None
        with self.script.block(f"with fails({at}, {error!r})"), fails(at, error):
            yield

    @rule(name=names, change=st.sampled_from(sorted(CHANGES)), at=st.integers(1, 80), error=st.sampled_from([*FAULTS]))
    def fail_in(self, change: str, name: str, at: int, error: str) -> None:
        """A change of an adapter, of which an operation of torch fails: all of it is made, or nothing."""
        world = self.world
        if name in world.adapters:
            injection = world.injection(name)
            with self.failing(at, error):
                CHANGES[change](injection)
            world.adapters[name].merged = injection.merged
            if name not in peftcore.injections(world.model):
                world.without(name)

    @rule(name=names, method=st.sampled_from(METHODS), at=st.integers(1, 80), error=st.sampled_from([*FAULTS]))
    def fail_in_apply(self, name: str, method: str, at: int, error: str) -> None:
        world = self.world
        if name not in world.adapters:
            with self.failing(at, error):
                world.apply(world.model, name, case_of(method, world.host.name))
            if name in (here := peftcore.injections(world.model)):
                here[name].remove()
