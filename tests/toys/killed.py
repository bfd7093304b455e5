"""Processes that kill themselves by SIGKILL at their n-th write, in the middle of a file, or at an optimizer's step.

A child is forked after the imports, so a try takes as long as its work. A child of which a point is asked dies before
the operation, or in the middle of what a library in another language writes: half of the file is there then.
"""

from __future__ import annotations

import json
import operator
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.symlink", "os.link", "os.truncate"}
"""Python's audit events that change a folder; ``open`` counts if it is for writing."""
MANY, SEED = (int(os.environ.get(name, default)) for name, default in (("PEFTCORE_KILLS", "6"), ("PEFTCORE_SEED", "0")))
"""Points that slow tests try, and the seed that draws them; ``make kills`` tries more."""
TIMEOUT = 120.0
"""Seconds after which a child is stuck."""


class Points:
    """Counts the points at which a process can be killed, and kills it at one of them."""

    def __init__(self, root: Path, at: int) -> None:
        self.root, self.at, self.seen = str(root), at, list[str]()

    def reach(self, what: str, middle: Callable[[], object] = lambda: None) -> None:
        self.seen.append(what)
        if len(self.seen) == self.at:
            middle()
            os.kill(os.getpid(), signal.SIGKILL)

    def below(self, path: Any) -> bool:
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        return os.path.abspath(os.fsdecode(path)).startswith(self.root)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        writes = event in WRITES or opened
        if writes and isinstance(args[0], str | bytes | os.PathLike) and self.below(args[0]):
            self.reach(f"{event} {os.path.basename(os.fsdecode(args[0]))}")

    def around(self, own: Callable[..., Any], at: int, name: str) -> Callable[..., Any]:
        """A function of a library that writes a file, with a point before it and one in the middle of it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            path = args[at]
            if not isinstance(path, str | os.PathLike) or not self.below(path):
                return own(*args, **kwargs)
            self.reach(f"{name} {os.path.basename(path)}")

            def half() -> None:
                own(*args, **kwargs)
                Path(path).write_bytes(Path(path).read_bytes()[: Path(path).stat().st_size // 2])

            at_half = len(self.seen) + 1 == self.at
            self.reach(f"half of {name} {os.path.basename(path)}", half if at_half else lambda: None)
            return own(*args, **kwargs)

        return call

    def install(self) -> None:
        """Watch this process from now on."""
        sync = os.fsync

        def synced(number: Any) -> None:
            if self.below(number if isinstance(number, int) else number.fileno()):
                self.reach("fsync")
            sync(number)

        patch.object(os, "fsync", synced).start()
        serialize = safetensors.torch.serialize_file  # type: ignore[attr-defined]
        patch.object(safetensors.torch, "serialize_file", self.around(serialize, 1, "save_file")).start()
        patch.object(torch, "save", self.around(torch.save, 1, "torch.save")).start()
        register_optimizer_step_pre_hook(lambda *_: self.reach("step"))
        sys.addaudithook(self.audit)


def in_child(do: Callable[[], object], root: Path, at: int = 0) -> list[str] | None:
    """Do something in a forked process, which kills itself at the point `at`; 0 is none.

    Returns the points that it passed, or None if it was killed.
    """
    said = root.with_name(f"{root.name}.said")
    if not (child := os.fork()):
        code = 1
        try:
            number = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(number, 1), os.dup2(number, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            points = Points(root, at)
            points.install()
            do()
            points.at = 0
            seen = [*points.seen]
            said.with_suffix(".points").write_text(json.dumps(seen))
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    end = time.monotonic() + TIMEOUT
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"stuck: {said.read_text(errors='replace')[-4000:]}")
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(ended[1])
    if code == -signal.SIGKILL and at:
        return None
    assert code == 0, f"exit {code}: {said.read_text(errors='replace')[-6000:]}"
    return list(json.loads(said.with_suffix(".points").read_text()))


@contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """Context manager in which a folder, made anew, is the current one; removed at the end."""
    before = Path.cwd()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def killed_at_points(
    begin: Callable[[], object],
    again: Callable[[], object],
    found: Callable[[], Any],
    root: Path,
    count: int,
    seed: int = SEED,
    before: Callable[[], object] = lambda: None,
    among: Callable[[str], bool] = lambda point: True,
    same: Callable[[Any, Any], bool] = operator.eq,
) -> list[str]:
    """Kill `begin` at so many points, drawn by a seed, do `again`, and expect what is `found`
    without any kill. Every second time `again` is killed too, and done once more.

    Everything is done in folders of their own, each the current one. Returns the points that there are.

    Args:
        before: what is done, undisturbed, before `begin` in each folder.
        among: which points are wanted, by what is done there.
        same: compares what is found.
    """
    draw = random.Random(seed)
    with inside(root / "whole") as folder:
        in_child(before, folder)
        points = in_child(begin, folder)
        wanted = found()
    assert points
    numbers = [number for number, point in enumerate(points, 1) if among(point)]
    wrong = []
    for number in sorted(draw.sample(numbers, min(count, len(numbers)))):
        with inside(root / "cut") as folder:
            in_child(before, folder)
            assert in_child(begin, folder, number) is None, f"not killed at {number}: {points[number - 1]}"
            then = draw.randrange(1, len(points)) if number % 2 else 0
            try:
                if then:
                    in_child(again, folder, then)
                in_child(again, folder)
                if not same(here := found(), wanted):
                    wrong.append(f"{number} ({points[number - 1]}), then {then}: {_difference(here, wanted)}")
            except AssertionError as error:
                wrong.append(f"{number} ({points[number - 1]}), then {then}: {str(error)[-1500:]}")
    assert not wrong, f"{len(wrong)} of {len(points)} points:\n" + "\n".join(wrong[:12])
    return points


def _difference(here: Any, wanted: Any, where: str = "") -> str:
    if isinstance(here, dict) and isinstance(wanted, dict):
        names = [name for name in {**here, **wanted} if here.get(name) != wanted.get(name)]
        return "; ".join(_difference(here.get(name), wanted.get(name), f"{where}/{name}") for name in names)
    return f"{where}: {str(here)[:300]} != {str(wanted)[:300]}"
