"""Finds the points of an operation at which `inject_faults` raises errors: operations of torch, system calls for files,
and lines of Python.

There is one class for each kind of point. It counts the points while the operation runs, and can raise an error at one
of them.
"""

from __future__ import annotations

import ast
import builtins
import errno
import functools
import io
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["tensor", "files", "line"]
KINDS: tuple[Kind, ...] = ("tensor", "files", "line")


@dataclass(frozen=True, order=True)
class Point:
    """A point of an operation at which an error can be raised.

    Attributes:
        place: the line of the package, and the torch function or system call that the line calls.
        count: how often the place has been passed then, starting at 1.
    """

    place: str
    count: int

    def __str__(self) -> str:
        return self.place if self.count == 1 else f"{self.place}, pass {self.count}"


class PointCounter(ABC):
    """Counts the points of one kind while an operation runs, and can raise an error at one of them."""

    kind: Kind
    errors: ClassVar[dict[str, Callable[[], BaseException]]]

    def __init__(self, packages: Sequence[Path], at: Point | None = None, error: str = "") -> None:
        self.packages = tuple(str(each) + os.sep for each in packages)
        self.at, self.error = at, error
        self.passes: Counter[str] = Counter()
        self.hit = False
        self._known: dict[str, bool] = {}

    def allows(self, place: str, error: str) -> bool:
        """True if the error of this name can be raised at a place."""
        return True

    def is_at(self, place: str) -> bool:
        """Count a pass through a place, and return whether the error must be raised now."""
        self.passes[place] += 1
        if self.hit or self.at is None or place != self.at.place or self.passes[place] != self.at.count:
            return False
        self.hit = True
        return True

    def place(self, what: str = "") -> str:
        """Return, as text, the line of the package that is running now, followed by `what`."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not self._inside(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is None:
            return what
        return f"{self.told(frame)}{', ' if what else ''}{what}"

    def told(self, frame: FrameType) -> str:
        """Return the line and the function of a frame, as text."""
        file = frame.f_code.co_filename
        path = next(file.removeprefix(each) for each in self.packages if file.startswith(each))
        return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"

    def _inside(self, path: str) -> bool:
        known = self._known.get(path)
        if known is None:
            known = self._known[path] = path.startswith(self.packages) and not path.startswith(OWN)
        return known

    @abstractmethod
    def entered(self) -> Any:
        """Return a context manager in which points are counted."""


OWN = str(Path(__file__).parent) + os.sep


class TensorPoints(PointCounter):
    kind = "tensor"
    errors: ClassVar = {
        "RuntimeError": lambda: RuntimeError("an operation of torch that fails"),
        "OutOfMemoryError": lambda: torch.OutOfMemoryError("an operation of torch that finds no memory"),
        "KeyboardInterrupt": KeyboardInterrupt,
    }

    def entered(self) -> Any:
        return _TensorMode(self)

    def before(self, function: Any) -> None:
        """Raise the error if this operation of torch is the point at which it must be raised. After running out of
        memory, later operations that need memory fail too."""
        full = self.hit and self.error == "OutOfMemoryError"  # and stays so
        if self.is_at(self.place(str(function))) or (full and _needs_memory(function)):
            raise self.errors[self.error]()


def _needs_memory(function: Any) -> bool:
    schema = getattr(function, "_schema", None)  # operators that take functions have none
    return schema is not None and any(each.alias_info is None and "Tensor" in str(each.type) for each in schema.returns)


class _TensorMode(TorchDispatchMode):
    def __init__(self, faults: TensorPoints) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.faults = faults

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.faults.before(function)
        return function(*args, **(kwargs or {}))


WRITING = ("mkdir", "replace", "rename", "fsync", "link", "symlink", "truncate")
"""System calls that need disk space."""
REMOVING = ("chmod", "rmdir", "unlink", "remove")
PROBING = ("stat", "lstat", "scandir", "listdir")


class FilePoints(PointCounter):
    kind = "files"
    errors: ClassVar = {
        "no space": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "no permission": lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        "no such folder": lambda: FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
        "a part written": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "KeyboardInterrupt": KeyboardInterrupt,
    }
    roots: tuple[str, ...] = ()
    """The folders whose files count: only system calls for files in them are points."""

    def allows(self, place: str, error: str) -> bool:
        call = place.rpartition(", ")[2]
        writes = call in WRITING or call.startswith(("open to write", "write"))
        return {
            "no space": writes,
            "no such folder": call not in PROBING,
            "a part written": call.startswith("write"),
        }.get(error, True)

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in (*WRITING, *REMOVING, *PROBING):
                stack.enter_context(patch.object(os, name, self._counted(getattr(os, name), name)))
            opened = self._opening(io.open)
            stack.enter_context(patch.object(io, "open", opened))
            stack.enter_context(patch.object(builtins, "open", opened))
            write = self._serializing(safetensors.torch.serialize_file)  # type: ignore[attr-defined]
            stack.enter_context(patch.object(safetensors.torch, "serialize_file", write))
            for module in list(sys.modules.values()):  # those that import it by name
                if getattr(module, "__name__", "").split(".")[0] in self.names() and "safe_open" in vars(module):
                    stack.enter_context(patch.object(module, "safe_open", self._reading(safetensors.safe_open)))
            yield

    def names(self) -> set[str]:
        """Return the names of the packages, without their folders."""
        return {Path(each).name for each in self.packages}

    def before(self, call: str, path: Any) -> None:
        """Raise the error if this system call is the point at which it must be raised. After running out of space,
        later writes fail too."""
        if not self._counts(path):
            return
        place = self.place(call)
        full = self.hit and self.error in ("no space", "a part written") and self.allows(place, "no space")
        if self.is_at(place) or full:
            raise self.errors[self.error]()

    def _counts(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        return text.startswith(self.roots) or not (os.path.isabs(text) or text.endswith(".py"))

    def _counted(self, own: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.before(name, args[0] if args else kwargs.get("path", "."))
            return own(*args, **kwargs)

        return call

    def _opening(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = any(sign in mode for sign in "wax+")
            if isinstance(file, int) or not self._counts(file):
                return own(file, mode, *args, **kwargs)
            self.before("open to write" if writes else "open", file)
            opened = own(file, mode, *args, **kwargs)
            return _Written(opened, self) if writes else opened

        return call

    def _serializing(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                self.before("write tensors", path)
            except OSError as error:
                if self.error == "a part written":
                    own(tensors, path, *args, **kwargs)
                    _cut(path)
                raise SafetensorError(f"I/O error: {error}") from None  # as the library has it
            return own(tensors, path, *args, **kwargs)

        return call

    def _reading(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            self.before("open", path)
            return own(path, *args, **kwargs)

        return call


_STAT, _TRUNCATE = os.stat, os.truncate


def _cut(path: Any) -> None:
    """Truncate a file to the first half of its content."""
    _TRUNCATE(path, _STAT(path).st_size // 2)


class _Written:
    """Wraps a file that is open for writing, so that a write can fail."""

    def __init__(self, file: Any, faults: FilePoints) -> None:
        self._file, self._faults = file, faults

    def write(self, content: Any) -> int:
        try:
            self._faults.before("write", self._file.name)
        except OSError:
            if self._faults.error == "a part written":
                self._file.write(content[: len(content) // 2])
            raise
        written: int = self._file.write(content)
        return written

    def __enter__(self) -> _Written:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class LinePoints(PointCounter):
    kind = "line"
    errors: ClassVar = {"KeyboardInterrupt": KeyboardInterrupt}

    @contextmanager
    def entered(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.hit or not self._inside(frame.f_code.co_filename) or _ends_a_block(frame):
            frame.f_trace = None  # a generator that goes on has its own
            return None
        ends = ends_of_blocks(frame.f_code.co_filename)
        unguarded = 3 if frame.f_code.co_name == "__enter__" else 0  # up to its ``try``
        last = 0

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last, unguarded
            if event == "line" and not self.hit:
                before, last = last, frame.f_lineno
                unguarded -= 1
                if unguarded < 0 and before not in ends.get(last, ()) and self.is_at(self.told(frame)):
                    sys.settrace(None)
                    raise self.errors[self.error]()
            return line

        return line


def _ends_a_block(frame: FrameType) -> bool:
    """Whether a frame is inside an ``__exit__``, which Python does not protect from an interrupt."""
    above: FrameType | None = frame
    while above is not None:
        if above.f_code.co_name == "__exit__":
            return True
        above = above.f_back
    return False


@functools.cache
def ends_of_blocks(file: str) -> dict[int, range]:
    """Return the line numbers of the ``with`` statements in a file, each with the range of lines of its block. Python
    executes the line of a ``with`` statement again before it calls ``__exit__``."""
    nodes = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
    blocks = [node for node in nodes if isinstance(node, ast.With | ast.AsyncWith)]
    return {node.lineno: range(node.body[0].lineno, (node.end_lineno or 0) + 1) for node in blocks}


FAULTS: dict[Kind, type[PointCounter]] = {"tensor": TensorPoints, "files": FilePoints, "line": LinePoints}
