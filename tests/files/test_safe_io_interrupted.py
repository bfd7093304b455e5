"""Each call of the system in turn fails or is interrupted while an adapter is saved: the folder has the old adapter or
the new one, whole, and nothing else."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from file_toys import adapted, bytes_of, host

import peftcore
from peftcore.files.safe_io import discard

CALLS = ("mkdir", "replace", "rename", "fsync", "chmod", "rmdir", "unlink", "scandir", "open", "lstat", "stat")


def failing(patch: pytest.MonkeyPatch, n: int, error: BaseException) -> list[int]:
    """Lets the n-th of these calls fail; returns how many there were."""
    count = [0]

    def counted(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == n:
                raise error
            return own(*args, **kwargs)

        return call

    for name in CALLS:
        patch.setattr(os, name, counted(getattr(os, name)))
    return count


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("fresh", [True, False], ids=["new folder", "over an old one"])
def test_nothing_is_left_of_a_save(fresh: bool, error: BaseException, tmp_path: Path) -> None:
    old, new = adapted(1.0), adapted(2.0, alpha=16.0)
    new.save(tmp_path / "wanted")
    wanted, n = bytes_of(tmp_path / "wanted"), 0
    while True:
        n += 1
        folder = tmp_path / f"adapter-{n}"
        if not fresh:
            old.save(folder)
        with pytest.MonkeyPatch.context() as patch:
            count = failing(patch, n, error)
            try:
                new.save(folder)
                done = True
            except (OSError, KeyboardInterrupt):
                done = False
        left = bytes_of(folder) if folder.exists() else {}
        assert left.keys() <= wanted.keys(), n
        assert not done or left == wanted, n
        if "adapter.safetensors" in left:
            loaded = peftcore.load(host()[0], folder)
            assert float(next(loaded.parameters()).mean()) in (1.0, 2.0), n
        else:
            assert fresh
        if count[0] < n:
            break
    assert n > 20 and done


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_folder_goes_at_the_second_try(error: BaseException, tmp_path: Path) -> None:
    n = 0
    while True:
        n += 1
        folder = tmp_path / f".{n}.partial"
        (folder / "inside").mkdir(parents=True)
        (folder / "inside" / "file").write_text("some")
        with pytest.MonkeyPatch.context() as patch:
            count = failing(patch, n, error)
            try:
                discard(folder)
            except KeyboardInterrupt:
                assert isinstance(error, KeyboardInterrupt)
        assert not folder.exists(), n
        if count[0] < n:
            break
    assert n > 5
