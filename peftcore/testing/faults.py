"""Raises artificial errors (faults) at every point of an operation. After each fault, the model must be in the state
before or in the state after the operation.

    report = inject_faults(lambda scene: scene.needs.merge(), make)
    assert not report.found, report

`make` builds a `Scene`: a model, and the other objects that the operation needs. All scenes that it builds must be
equal. The operation first runs without a fault, to count its points. Then it runs on a fresh scene for each point and
each error that can be raised at it. After each run, the scene must be equal, bit by bit, to the scene before or after
the operation, and the state of the process must be unchanged. If the operation was undone, it must succeed when it is
run again.

There are three kinds of points:

- "tensor": an operation of torch. It fails, runs out of memory (then later operations do too), or is interrupted.
- "files": a system call for files in the scene's folder or in the folder of temporary files. It has no space or no
  permission, does not find its folder, writes only a part, or is interrupted.
- "line": a line of Python in the package, before which Ctrl-C is pressed. The beginning of ``__enter__`` and the ends
  of ``with`` blocks are left out, because Python cannot protect them from an interrupt.

If a point is passed several times, its first passes and its last pass count as separate points.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.testing.fault_points import FAULTS, KINDS, FilePoints, Kind, Point, PointCounter
from peftcore.testing.snapshots import FILE, Scene, Snapshot, process, put_back, snapshot

Make = Callable[[Path], Scene]
"""Type of functions that build a scene (`Scene`), with its files in the given empty folder. All scenes that a function
builds must be equal."""
Operation = Callable[[Scene], object]


@dataclass(frozen=True)
class Fault:
    """A run of an operation that left the scene in a wrong state: neither the state before nor the state after the
    operation.

    Attributes:
        operation: the name of the operation.
        kind: the kind of the point.
        error: the error that was raised.
        point: the point.
        wrong: the differences between the states, as text.
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
    """The result of `inject_faults`.

    Attributes:
        operation: the name of the operation.
        points: the number of points of each kind.
        tried: the number of runs with a fault, for each kind of point.
        found: the faults that left a wrong state.
    """

    operation: str
    points: dict[str, int] = field(default_factory=dict)
    tried: dict[str, int] = field(default_factory=dict)
    found: list[Fault] = field(default_factory=list)

    def __str__(self) -> str:
        tried = ", ".join(f"{count} of {kind}" for kind, count in self.tried.items())
        head = f"{self.operation}: {sum(self.tried.values())} faults ({tried}), {len(self.found)} with a wrong end"
        return "\n".join([head, *(f"  {each}" for each in self.found)])


def inject_faults(
    operation: Operation,
    make: Make,
    *,
    name: str = "",
    kinds: Sequence[Kind] = KINDS,
    every: int = 1,
    most: int | None = None,
    often: int = 2,
    seed: int = 0,
    packages: Sequence[str] = (),
    leave: Sequence[str] = (),
    ends: Sequence[Operation] = (),
    seconds: float | None = None,
) -> FaultReport:
    """Run an operation with a fault at each of its points, and return a report of the faults that left a wrong state.

    Args:
        operation: a function that runs the operation on a scene.
        make: a function that builds the scene, with its files in an empty folder. All scenes must be equal.
        name: the name of the operation in the report.
        kinds: the kinds of points to try.
        every: if larger than 1, only one in `every` faults is tried, chosen at random.
        most: the largest number of faults to try for each kind, chosen at random.
        often: the number of first passes through a place that count as points, in addition to the last pass.
        seed: the seed of the random choices.
        packages: folders of packages, besides peftcore, whose lines are points.
        leave: prefixes of places (see `Snapshot.differences`) that may differ.
        ends: other operations whose final states are accepted after a fault too, if the raised error has a note
            (`add_note`).
        seconds: the time after which no further faults are tried.

    Raises:
        ValueError: two scenes built by `make` differ, or two runs of the operation have different results, so that
            nothing can be compared.
    """
    end = None if seconds is None else time.monotonic() + seconds
    report = FaultReport(name or getattr(operation, "__name__", "operation"))
    trial = _Trial(operation, make, [Path(peftcore.__file__).parent, *map(Path, packages)], leave, ends)
    for kind in kinds:
        points, wanted = trial.points(kind, often), []
        for point in points:
            wanted += [(point, error) for error in FAULTS[kind].errors if FAULTS[kind]([]).allows(point.place, error)]
        report.points[kind], report.tried[kind] = len(points), 0
        share = min(max(1, len(wanted) // every), len(wanted), len(wanted) if most is None else most)
        if share < len(wanted):
            wanted = random.Random(seed).sample(wanted, share)
        for point, error in wanted:
            if end is not None and time.monotonic() > end:
                break
            wrong = trial.run(kind, point, error)
            if wrong is not None:
                report.tried[kind] += 1
            if wrong:
                report.found.append(Fault(report.operation, kind, error, point, wrong))
    return report


class _Trial:
    """Runs one operation many times, with and without faults."""

    def __init__(
        self,
        operation: Operation,
        make: Make,
        packages: Sequence[Path],
        leave: Sequence[str],
        other_ends: Sequence[Operation],
    ) -> None:
        self.operation, self.make, self.packages, self.leave = operation, make, packages, leave
        self.root, ends = "", []
        for _ in range(2):  # the first run imports what it needs
            with self.scene() as scene:
                begin = snapshot(scene)
                operation(scene)
                ends.append((begin, snapshot(scene)))
        (before, after), (again, other) = ends
        if different := before.differences(again, leave=leave) or after.differences(other, leave=leave):
            raise ValueError(
                f"two runs of the operation differ at {_few(different)}; `make` must build an equal scene each time"
            )
        self.before, self.after = again, other
        self.others: list[Snapshot] = []
        for other_end in other_ends:
            with self.scene() as scene:
                other_end(scene)
                self.others.append(snapshot(scene))

    @contextmanager
    def scene(self) -> Iterator[Scene]:
        """Context manager that yields a fresh scene, and in which temporary files are in a separate folder. Uuids are
        numbered from the start, so that two scenes get the same ones."""
        self.drawn = 0
        with (
            tempfile.TemporaryDirectory(prefix="faults-") as root,
            patch.object(tempfile, "tempdir", f"{root}/tmp"),
            patch.object(uuid, "uuid4", self._uuid),
        ):
            os.mkdir(f"{root}/tmp")
            os.mkdir(f"{root}/scene")
            self.root = root
            yield self.make(Path(root, "scene"))

    def _uuid(self) -> uuid.UUID:
        self.drawn += 1
        return uuid.UUID(int=self.drawn)

    def points(self, kind: Kind, often: int) -> list[Point]:
        """Return the points of one kind in the operation."""
        faults = FAULTS[kind](self.packages)
        with self.scene() as scene:
            self._run(faults, scene)
        return [
            Point(place, count)
            for place, passes in faults.passes.items()
            for count in sorted({*range(1, min(often, passes) + 1), passes})
        ]

    def _run(self, faults: PointCounter, scene: Scene) -> BaseException | None:
        """Run the operation. Return the error that it raised, without its traceback; None if it raised none."""
        if isinstance(faults, FilePoints):
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
        """Run the operation with a fault. Return, as text, what is wrong afterwards; empty if nothing is wrong; None if
        the point was not reached."""
        faults = FAULTS[kind](self.packages, point, error)
        with self.scene() as scene, _quiet():
            before, around, drawn = snapshot(scene), process(), self.drawn
            raised = self._run(faults, scene)
            if not faults.hit:
                return None
            wrong = [*_misreported(faults, raised), *_changed(around)]
            put_back(around)
            now = snapshot(scene)
            loose = (*self.leave, FILE) if raised is not None else self.leave
            undone = raised is not None and not before.differences(now, same_scene=True, leave=loose)
            done = not self.after.differences(now, leave=loose)
            told = bool(getattr(raised, "__notes__", ())) and any(
                not each.differences(now, leave=loose) for each in self.others
            )
            if not (done or undone or told):
                end = self.after if raised is None else before
                parts = end.differences(now, same_scene=raised is not None, leave=loose)
                wrong.append(
                    f"differs from the state {'after' if raised is None else 'before'} the operation: {_few(parts)}"
                )
            if raised is not None and not any(each.startswith(FILE) for each in self.leave):
                wrong += self._half_written(before, now)
            if undone and not wrong:
                self.drawn = drawn
                wrong += self._again(scene)
        return "; ".join(wrong)

    def _half_written(self, before: Snapshot, now: Snapshot) -> Iterator[str]:
        """Yield messages about files whose content is neither that before nor that after the operation."""
        old, new, here = before.files(), self.after.files(), now.files()
        for place in sorted({*old, *new, *here}):
            if here.get(place) not in (old.get(place), new.get(place)):
                what = "half written" if place in old or place in new else "left behind"
                yield f"{place} is {what if place in here else 'lost'}"

    def _again(self, scene: Scene) -> Iterator[str]:
        """Run the operation again, without a fault. Yield messages about what is wrong afterwards."""
        try:
            self.operation(scene)
        except Exception as error:
            yield f"the next try raises {type(error).__name__}: {error}"
            return
        if parts := self.after.differences(snapshot(scene), leave=self.leave):
            yield f"the next try ends in another state: {_few(parts)}"


def _misreported(faults: PointCounter, raised: BaseException | None) -> Iterator[str]:
    """Yield a message if the operation raised another error than the fault, or did not raise an interrupt."""
    expected = faults.errors[faults.error]()
    if "UntypedStorage" in str(raised):  # safetensors replaces any error of torch in its get_tensor by a ValueError
        return
    if "While copying the parameter" in str(raised) and str(expected) in str(raised):  # and load_state_dict of torch
        return
    if isinstance(expected, KeyboardInterrupt):
        if not isinstance(raised, KeyboardInterrupt):
            yield f"the interrupt became {type(raised).__name__}: {raised}" if raised else "the interrupt was swallowed"
    elif raised is not None and not isinstance(raised, (type(expected), PeftcoreError, OSError)):
        yield f"the error became {type(raised).__name__}: {raised}"


def _changed(around: Mapping[str, Any]) -> Iterator[str]:
    """Yield messages about changes that the operation left in the state of the process."""
    if _left(around):
        gc.collect()  # what an error held
    for what, (before, now) in _left(around).items():
        told = f" ({before} and now {now})" if len(f"{before}{now}") < 200 else ""
        yield f"{what}: differs from before{told}"


def _left(around: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the entries of the process's state that have changed, as (before, now). Counted entries, such as open
    files, count as changed only if there are more now."""
    both = {what: (around[what], now) for what, now in process().items()}
    return {what: (a, b) for what, (a, b) in both.items() if (b - a if isinstance(b, Counter) else b != a)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that suppresses warnings, and reports of errors that are raised while objects are deleted."""
    with warnings.catch_warnings(), patch.object(sys, "unraisablehook", lambda raised: None):
        warnings.simplefilter("ignore")
        yield


def _few(parts: Sequence[str]) -> str:
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
