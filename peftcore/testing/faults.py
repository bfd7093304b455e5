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
"""Builds a scene, the same each time, whose files are in the given empty folder."""
Operation = Callable[[Scene], object]


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
    """Run an operation with a fault at each of its points, and return what was wrong afterwards.

    Args:
        operation: a function of the scene.
        make: builds the scene in an empty folder; the same each time.
        name: the name of the operation in the report.
        kinds: the kinds of points.
        every: of all faults a share of one in `every`, chosen by `seed`.
        most: no more faults of each kind than this many, chosen by `seed`.
        often: how many of the first passes through a place are points; its last pass is one too.
        seed: see `every`.
        packages: folders of further packages, whose lines are points too.
        leave: beginnings of places (see `Snapshot.differences`) that may differ.
        ends: operations that lead to further states in which a fault may leave a scene, if a note of the error says so.
        seconds: no further fault is tried after this time.

    Raises:
        ValueError: two scenes differ, or the operation gives two results, so nothing can be compared.
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
    """Runs one operation many times."""

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
            raise ValueError(f"two runs of the operation differ at {_few(different)}; `make` must build the same again")
        self.before, self.after = again, other
        self.others: list[Snapshot] = []
        for other_end in other_ends:
            with self.scene() as scene:
                other_end(scene)
                self.others.append(snapshot(scene))

    @contextmanager
    def scene(self) -> Iterator[Scene]:
        """Context manager with a fresh scene, and a folder of temporary files of its own. Uuids are counted, so two
        scenes have the same ones."""
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
        """Return the points of the operation."""
        faults = FAULTS[kind](self.packages)
        with self.scene() as scene:
            self._run(faults, scene)
        return [
            Point(place, count)
            for place, passes in faults.passes.items()
            for count in sorted({*range(1, min(often, passes) + 1), passes})
        ]

    def _run(self, faults: PointCounter, scene: Scene) -> BaseException | None:
        """Run the operation; returns what it raised, without the frames that it came through."""
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
        """Return what is wrong after a run with a fault, an empty text where nothing is; None where the point was not
        reached."""
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
                wrong.append(f"not as {'after' if raised is None else 'before'}: {_few(parts)}")
            if raised is not None and not any(each.startswith(FILE) for each in self.leave):
                wrong += self._half_written(before, now)
            if undone and not wrong:
                self.drawn = drawn
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


def _misreported(faults: PointCounter, raised: BaseException | None) -> Iterator[str]:
    """Yield what is wrong with the error that the operation raised."""
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
    """Yield what the operation left in the process."""
    if _left(around):
        gc.collect()  # what an error held
    for what, (before, now) in _left(around).items():
        told = f" ({before} and now {now})" if len(f"{before}{now}") < 200 else ""
        yield f"{what}: not as before{told}"


def _left(around: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs in the process, before and now; of what is counted, what there is more of."""
    both = {what: (around[what], now) for what, now in process().items()}
    return {what: (a, b) for what, (a, b) in both.items() if (b - a if isinstance(b, Counter) else b != a)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager without warnings, and without reports of errors that are raised while objects are freed."""
    with warnings.catch_warnings(), patch.object(sys, "unraisablehook", lambda raised: None):
        warnings.simplefilter("ignore")
        yield


def _few(parts: Sequence[str]) -> str:
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
