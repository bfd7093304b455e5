"""Files are whole or as they were, whatever happens to the writer."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from file_toys import adapted, bytes_of, host
from safetensors import SafetensorError
from slowly import quick

import peftcore
from peftcore.files.formats.card import CARD
from peftcore.files.formats.native import ENVELOPE, METADATA, TENSORS
from peftcore.files.safe_io import TensorFile, write_tensors

KILLED = """
import os, sys, torch, peftcore
from peftcore.testing import HOSTS

torch.manual_seed(0)
injection = peftcore.apply(HOSTS["mlp"].build()[0], "lora", target=["first", "second"], rank=64)


def tell(what):  # at once: of a line that is printed, a kill may leave the half
    os.write(1, f"{what}\\n".encode())


for line in sys.stdin:
    number = int(line)
    if writer := os.fork():
        os.waitpid(writer, 0)
        tell("dead")
        continue
    tell(os.getpid())
    while True:
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.fill_(number)
        injection.save(sys.argv[1])
        tell(number)
        number += 1
"""


@pytest.mark.slow
def test_a_kill_leaves_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    folder, moments = tmp_path / "adapter", random.Random(0)
    adapted(0.0).save(folder)
    model, last, torn = host()[0], 0, 0
    writers = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert writers.stdin is not None and writers.stdout is not None
    pause = 0.05
    for _ in range(300):
        print(last + 1, file=writers.stdin, flush=True)
        writer = int(writers.stdout.readline())
        time.sleep(moments.uniform(0.0, pause))
        os.kill(writer, signal.SIGKILL)
        finished = last
        while (line := writers.stdout.readline()) != "dead\n":
            finished = int(line)
        injection = peftcore.load(model, folder)
        found = {float(value) for each in injection.parameters() for value in each.unique()}
        injection.remove()
        assert len(found) == 1, "half of one adapter and half of another"
        pause *= 1.2 if finished == last else 0.8  # on any machine, about half of the writers get to write one
        last = int(found.pop())
        assert last in (finished, finished + 1)
        torn += any(each.suffix == ".partial" for each in folder.iterdir())
        if last > 20 and torn > 20:
            break
    writers.stdin.close()
    assert writers.wait() == 0
    assert last > 10 and torn, "no writer was killed while it wrote"
    adapted(0.5).save(folder)
    assert {each.name for each in folder.iterdir() if each.suffix != ".partial"} == {CARD, ENVELOPE, TENSORS}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_for_whom_the_user_lets_read_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        adapted().save(tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {each.stat().st_mode & 0o777 for each in (tmp_path / "adapter").iterdir()} == {0o666 & ~mask}


def test_what_killed_writers_left_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    old, new, theirs = (folder / f".{name}.partial" for name in ("old", "new", "link"))
    old.mkdir()
    (old / "adapter.safetensors").touch()
    new.mkdir()
    theirs.symlink_to("nothing")
    os.utime(old, (0, 0))
    adapted().save(folder)
    assert not old.exists() and new.exists() and theirs.is_symlink()


def _fails(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def _fails_in_the_library(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _writes_half(tensors: Any, path: Path, **_: Any) -> None:
    Path(path).write_bytes(b"half")
    _fails_in_the_library()


@pytest.mark.parametrize(
    ("what", "fails"),
    [
        ("peftcore.files.safe_io.os.replace", _fails),
        ("peftcore.files.safe_io.os.fsync", _fails),
        ("peftcore.files.safe_io.save_file", _fails_in_the_library),
        ("peftcore.files.safe_io.save_file", _writes_half),
        ("pathlib.Path.write_text", _fails),
    ],
)
def test_a_full_disk_leaves_the_old_adapter(what: str, fails: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder, outside = tmp_path / "adapter", tmp_path / "outside"
    adapted(1.0).save(folder)
    before = bytes_of(folder)
    injection = adapted(2.0, alpha=16.0)
    with monkeypatch.context() as patch:
        patch.setattr(what, fails)
        with pytest.raises(OSError, match="No space left"):
            injection.save(folder)
        with pytest.raises(OSError, match="No space left"):
            injection.save(outside)
    left = bytes_of(folder)
    assert left.keys() == before.keys(), "a part of a file was left"
    assert left == before
    loaded = peftcore.load(host()[0], folder)
    assert float(next(loaded.parameters()).mean()) == 1.0
    assert not [*folder.glob(".*.partial"), *outside.glob(".*.partial")]


def test_only_what_changes_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted(1.0).save(folder)
    before = {each.name: each.stat().st_ino for each in folder.iterdir()}
    adapted(2.0).save(folder)
    after = {each.name: each.stat().st_ino for each in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {TENSORS}


LIMITED = """
import resource, sys, torch, peftcore
from peftcore.testing import HOSTS

torch.manual_seed(0)
injection = peftcore.apply(HOSTS["mlp"].build()[0], "lora", target=["first", "second"], rank=64)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    injection.save(sys.argv[1])
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("limit", quick([0, 1000, 15_000], [1000]))
def test_files_that_may_not_grow_leave_the_old_adapter(limit: int, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted(1.0).save(folder)
    assert (folder / TENSORS).stat().st_size > 15_000
    before = bytes_of(folder)
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(folder), str(limit)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "OSError\n"
    assert bytes_of(folder) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit


def test_equal_tensors_are_equal_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    tensors = {name: torch.full((3,), float(ord(name))) for name in "dacb"}
    one, other = tmp_path / "one", tmp_path / "other"
    write_tensors(one, tensors, {METADATA: "text"})
    write_tensors(other, dict(sorted(tensors.items())), {METADATA: "text"})
    assert one.read_bytes() == other.read_bytes()
    assert list(TensorFile(one).shapes) == ["a", "b", "c", "d"]


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    parts = {"a": flat[:4], "b": flat[4:10].view(2, 3), "c": flat.view(3, 4)[1:, ::2], "again": flat[:4]}
    write_tensors(tmp_path / "shared", parts, {})
    write_tensors(tmp_path / "apart", {name: each.clone() for name, each in parts.items()}, {})
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "apart").read_bytes()
    values = TensorFile(tmp_path / "shared").read(parts)
    assert all(torch.equal(values[name], each) for name, each in parts.items())


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    """Of an optimizer without a state, such as SGD, for instance; the library's own file of none cannot be read."""
    path = tmp_path / "none.safetensors"
    for metadata in ({}, {"some": "text"}):
        write_tensors(path, {}, metadata)
        assert (TensorFile(path).read(), TensorFile(path).metadata) == ({}, metadata)
