"""Faults at every point of an operation: whatever fails, and wherever, a model is as before or as after.

    report = inject_faults(lambda scene: scene.needs.merge(), make)
    assert not report.found, report

`make` builds a `Scene`, the same each time: a model, and what the operation needs. The operation runs once without a
fault, which counts its points. Then it runs once for each point and each error that can be raised there, on a fresh
scene. After each run the scene is compared with those of before and after, bit by bit; the process has to be as it was;
and where nothing was done, the operation has to succeed at the next try.

Points are of three kinds. "tensor": an operation of torch, which fails, finds no memory (then nor do later ones that
need memory), or is interrupted. "files": a call of the system for files below the scene's folder or the folder of
temporary files, which finds no space, no permission or no folder, writes a part only, or is interrupted. "line": a line
of Python in the package, before which Ctrl-C is pressed; the begin of ``__enter__`` and the ends of ``with`` blocks are
left out, since Python guards neither from an interrupt. A point that is passed several times counts as several: its
first passes and its last.
"""

from __future__ import annotations

import ast
import builtins
import errno
import functools
import gc
import io
import os
import random
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.utils._python_dispatch import TorchDispatchMode

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.testing.snapshots import FILE, Scene, Snapshot, process, put_back, snapshot

Kind = Literal["tensor", "files", "line"]
KINDS: tuple[Kind, ...] = ("tensor", "files", "line")
Make = Callable[[Path], Scene]
"""Builds a scene, the same each time, whose files are in the given empty folder."""
Operation = Callable[[Scene], object]


@dataclass(frozen=True, order=True)
class Point:
    """A point of an operation.

    Attributes:
        place: the line of the package, and what it calls.
        count: which pass through the place, from 1 on.
    """

    place: str
    count: int

    def __str__(self) -> str:
        return self.place if self.count == 1 else f"{self.place}, pass {self.count}"


@dataclass(frozen=True)
class Fault:
    """A run after which something is neither as before nor as after.

    Attributes:
        operation: the name of the operation.
        kind: the kind of the point.
        error: the error that was raised there.
        point: the point.
        wrong: what is wrong, and where.
    """

    operation: str
    kind: Kind
    error: str
    point: Point
    wrong: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.error} at {self.point}: {self.wrong}"


@dataclass
class FaultReport:
    """What `inject_faults` tried and found.

    Attributes:
        operation: the name of the operation.
        points: how many points of each kind the operation has.
        tried: how many runs with a fault of each kind there were.
        found: the faults after which something was wrong.
    """

    operation: str
    points: dict[str, int] = field(default_factory=dict)
    tried: dict[str, int] = field(default_factory=dict)
    found: list[Fault] = field(default_factory=list)

    def __str__(self) -> str:
        tried = ", ".join(f"{count} of {kind}" for kind, count in self.tried.items())
        head = f"{self.operation}: {sum(self.tried.values())} faults ({tried}), {len(self.found)} with a wrong end"
        return "\n".join([head, *(f"  {each}" for each in self.found)])


class _Faults(ABC):
    """Counts the points of one kind while it is entered, and raises an error at one of them."""

    kind: Kind
    errors: ClassVar[dict[str, Callable[[], BaseException]]]

    def __init__(self, packages: Sequence[Path], at: Point | None = None, error: str = "") -> None:
        self.packages = tuple(str(each) + os.sep for each in packages)
        self.at, self.error = at, error
        self.passes: Counter[str] = Counter()
        self.hit = False
        self._known: dict[str, bool] = {}

    def allows(self, place: str, error: str) -> bool:
        """Whether an error can be raised at a place."""
        return True

    def is_at(self, place: str) -> bool:
        """Count a pass through a place; returns whether the error is to be raised now."""
        self.passes[place] += 1
        if self.hit or self.at is None or place != self.at.place or self.passes[place] != self.at.count:
            return False
        self.hit = True
        return True

    def place(self, what: str = "") -> str:
        """Return the line of the package that runs now."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not self._inside(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is None:
            return what
        return f"{self.told(frame)}{', ' if what else ''}{what}"

    def told(self, frame: FrameType) -> str:
        """Return the place of a frame."""
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
        """Return the context manager in which points are counted."""


OWN = str(Path(__file__).parent) + os.sep


class _Tensors(_Faults):
    kind = "tensor"
    errors: ClassVar = {
        "RuntimeError": lambda: RuntimeError("an operation of torch that fails"),
        "OutOfMemoryError": lambda: torch.OutOfMemoryError("an operation of torch that finds no memory"),
        "KeyboardInterrupt": KeyboardInterrupt,
    }

    def entered(self) -> Any:
        return _TensorMode(self)

    def before(self, function: Any) -> None:
        """Raise the error if this operation is to fail."""
        full = self.hit and self.error == "OutOfMemoryError"  # and stays so
        if self.is_at(self.place(str(function))) or (full and _needs_memory(function)):
            raise self.errors[self.error]()


def _needs_memory(function: Any) -> bool:
    schema = getattr(function, "_schema", None)  # operators that take functions have none
    return schema is not None and any(each.alias_info is None and "Tensor" in str(each.type) for each in schema.returns)


class _TensorMode(TorchDispatchMode):
    def __init__(self, faults: _Tensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.faults = faults

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.faults.before(function)
        return function(*args, **(kwargs or {}))


WRITING = ("mkdir", "replace", "rename", "fsync", "link", "symlink", "truncate")
"""Calls of the system that need space."""
REMOVING = ("chmod", "rmdir", "unlink", "remove")
PROBING = ("stat", "lstat", "scandir", "listdir")


class _Files(_Faults):
    kind = "files"
    errors: ClassVar = {
        "no space": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "no permission": lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        "no such folder": lambda: FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
        "a part written": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "KeyboardInterrupt": KeyboardInterrupt,
    }
    roots: tuple[str, ...] = ()
    """The folders whose calls count."""

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
        """Return the names of the packages."""
        return {Path(each).name for each in self.packages}

    def before(self, call: str, path: Any) -> None:
        """Raise the error if this call is to fail."""
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
    """Leave the first half of a file."""
    _TRUNCATE(path, _STAT(path).st_size // 2)


class _Written:
    """A file that is open to be written, of which a write may fail."""

    def __init__(self, file: Any, faults: _Files) -> None:
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


class _Lines(_Faults):
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
        ends = _ends(frame.f_code.co_filename)
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
    """Whether a frame runs inside of an ``__exit__``, which Python does not guard from an interrupt."""
    above: FrameType | None = frame
    while above is not None:
        if above.f_code.co_name == "__exit__":
            return True
        above = above.f_back
    return False


@functools.cache
def _ends(file: str) -> dict[int, range]:
    """Return the lines of ``with`` statements of a file, each with the lines of its block: Python comes to such a line
    again before it calls ``__exit__``."""
    nodes = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
    blocks = [node for node in nodes if isinstance(node, ast.With | ast.AsyncWith)]
    return {node.lineno: range(node.body[0].lineno, (node.end_lineno or 0) + 1) for node in blocks}


def inject_faults(
    operation: Operation,
    make: Make,
    *,
    name: str = "",
    kinds: Sequence[Kind] = KINDS,
    every: int = 1,
    often: int = 2,
    seed: int = 0,
    packages: Sequence[str] = (),
    leave: Sequence[str] = (),
    seconds: float | None = None,
) -> FaultReport:
    """Run an operation with a fault at each of its points, and return what was wrong afterwards.

    Args:
        operation: a function of the scene.
        make: builds the scene in an empty folder; the same each time.
        name: the name of the operation in the report.
        kinds: the kinds of points.
        every: of all faults a share of one in `every`, chosen by `seed`.
        often: how many of the first passes through a place are points; its last pass is one too.
        seed: see `every`.
        packages: folders of further packages, whose lines are points too.
        leave: beginnings of places (see `Snapshot.differences`) that may differ.
        seconds: no further fault is tried after this time.

    Raises:
        ValueError: two scenes differ, or the operation gives two results, so nothing can be compared.
    """
    end = None if seconds is None else time.monotonic() + seconds
    report = FaultReport(name or getattr(operation, "__name__", "operation"))
    trial = _Trial(operation, make, [Path(peftcore.__file__).parent, *map(Path, packages)], leave)
    for kind in kinds:
        points, wanted = trial.points(kind, often), []
        for point in points:
            wanted += [(point, error) for error in FAULTS[kind].errors if FAULTS[kind]([]).allows(point.place, error)]
        report.points[kind], report.tried[kind] = len(points), 0
        if every > 1:
            wanted = random.Random(seed).sample(wanted, max(1, len(wanted) // every) if wanted else 0)
        for point, error in wanted:
            if end is not None and time.monotonic() > end:
                break
            wrong = trial.run(kind, point, error)
            if wrong is not None:
                report.tried[kind] += 1
            if wrong:
                report.found.append(Fault(report.operation, kind, error, point, wrong))
    return report


FAULTS: dict[Kind, type[_Faults]] = {"tensor": _Tensors, "files": _Files, "line": _Lines}


class _Trial:
    """Runs one operation many times."""

    def __init__(self, operation: Operation, make: Make, packages: Sequence[Path], leave: Sequence[str]) -> None:
        self.operation, self.make, self.packages, self.leave = operation, make, packages, leave
        self.root, ends = "", []
        for _ in range(2):  # the first run imports what it needs
            with self.scene() as scene:
                begin = snapshot(scene)
                operation(scene)
                ends.append((begin, snapshot(scene)))
        (before, after), (again, other) = ends
        if different := before.differences(again, leave=leave) or after.differences(other, leave=leave):
            raise ValueError(f"two runs of the operation differ at {_few(different)}; `make` must build the same again")
        self.before, self.after = again, other

    @contextmanager
    def scene(self) -> Iterator[Scene]:
        """Context manager with a fresh scene, and a folder of temporary files of its own."""
        with tempfile.TemporaryDirectory(prefix="faults-") as root, patch.object(tempfile, "tempdir", f"{root}/tmp"):
            os.mkdir(f"{root}/tmp")
            os.mkdir(f"{root}/scene")
            self.root = root
            yield self.make(Path(root, "scene"))

    def points(self, kind: Kind, often: int) -> list[Point]:
        """Return the points of the operation."""
        faults = FAULTS[kind](self.packages)
        with self.scene() as scene:
            self._run(faults, scene)
        return [
            Point(place, count)
            for place, passes in faults.passes.items()
            for count in sorted({*range(1, min(often, passes) + 1), passes})
        ]

    def _run(self, faults: _Faults, scene: Scene) -> BaseException | None:
        """Run the operation; returns what it raised, without the frames that it came through."""
        if isinstance(faults, _Files):
            faults.roots = (self.root,)
        try:
            with faults.entered():
                self.operation(scene)
        except (Exception, KeyboardInterrupt) as error:
            raised = error.with_traceback(None)
            raised.__cause__ = raised.__context__ = None
            return raised
        return None

    def run(self, kind: Kind, point: Point, error: str) -> str | None:
        """Return what is wrong after a run with a fault, an empty text where nothing is; None where the point was not
        reached."""
        faults = FAULTS[kind](self.packages, point, error)
        with self.scene() as scene, _quiet():
            before, around = snapshot(scene), process()
            raised = self._run(faults, scene)
            if not faults.hit:
                return None
            wrong = [*_misreported(faults, raised), *_changed(around)]
            put_back(around)
            now = snapshot(scene)
            loose = (*self.leave, FILE) if raised is not None else self.leave
            undone = raised is not None and not before.differences(now, same_scene=True, leave=loose)
            done = not self.after.differences(now, leave=loose)
            if not done and not undone:
                end = self.after if raised is None else before
                parts = end.differences(now, same_scene=raised is not None, leave=loose)
                wrong.append(f"not as {'after' if raised is None else 'before'}: {_few(parts)}")
            if raised is not None and not any(each.startswith(FILE) for each in self.leave):
                wrong += self._half_written(before, now)
            if undone and not wrong:
                wrong += self._again(scene)
        return "; ".join(wrong)

    def _half_written(self, before: Snapshot, now: Snapshot) -> Iterator[str]:
        """Yield the files that are neither those of before nor those of after."""
        old, new, here = before.files(), self.after.files(), now.files()
        for place in sorted({*old, *new, *here}):
            if here.get(place) not in (old.get(place), new.get(place)):
                what = "half written" if place in old or place in new else "left behind"
                yield f"{place} is {what if place in here else 'lost'}"

    def _again(self, scene: Scene) -> Iterator[str]:
        """Yield what is wrong after the next try, without a fault."""
        try:
            self.operation(scene)
        except Exception as error:
            yield f"the next try raises {type(error).__name__}: {error}"
            return
        if parts := self.after.differences(snapshot(scene), leave=self.leave):
            yield f"after the next try not as after: {_few(parts)}"


def _misreported(faults: _Faults, raised: BaseException | None) -> Iterator[str]:
    """Yield what is wrong with the error that the operation raised."""
    expected = faults.errors[faults.error]()
    if "UntypedStorage" in str(raised):  # safetensors, which is not in Python, loses what torch raised there
        return
    if isinstance(expected, KeyboardInterrupt):
        if not isinstance(raised, KeyboardInterrupt):
            yield f"the interrupt became {type(raised).__name__}: {raised}" if raised else "the interrupt was swallowed"
    elif raised is not None and not isinstance(raised, (type(expected), PeftcoreError, OSError)):
        yield f"the error became {type(raised).__name__}: {raised}"


def _changed(around: dict[str, Any]) -> Iterator[str]:
    """Yield what the operation left in the process."""
    if process() != around:
        gc.collect()  # what an error held
    for what, now in process().items():
        if now != around[what]:
            told = f" ({around[what]} and now {now})" if len(f"{around[what]}{now}") < 200 else ""
            yield f"{what}: not as before{told}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager without warnings, and without reports of errors that are raised while objects are freed."""
    with warnings.catch_warnings(), patch.object(sys, "unraisablehook", lambda raised: None):
        warnings.simplefilter("ignore")
        yield


def _few(parts: Sequence[str]) -> str:
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
