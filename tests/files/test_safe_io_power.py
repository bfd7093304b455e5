"""What a save calls complete is on the disk: contents are synced before a rename, and names after it."""

import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core_toys import stir
from disk_order import lost, recorded

import peftcore
from peftcore.files.safe_io import folder_lock, write_tensors, write_text
from peftcore.testing import HOSTS


def llama() -> peftcore.Injection:
    torch.manual_seed(0)
    injection = peftcore.apply(HOSTS["llama"].build()[0], "lora", rank=2, target=["attn.q", "attn.v"])
    stir(injection)
    return injection


def files(folder: Path) -> list[Path]:
    return [each for each in folder.rglob("*") if each.is_file()]


def save(format: str) -> Callable[[peftcore.Injection, Path], None]:
    return lambda injection, folder: injection.save(folder, format=format)


SAVES: dict[str, Callable[[peftcore.Injection, Path], object]] = {
    **{format: save(format) for format in ("peftcore", "peft", "kohya", "diffusers", "mlx", "gguf")},
    "one file": lambda injection, folder: injection.save(folder / "a.safetensors"),
    "two formats": lambda injection, folder: injection.save(folder, format=["peftcore", "peft"]),
    "a composition": lambda injection, folder: peftcore.save_composition(
        injection.model, peftcore.Average("lora"), folder
    ),
}


@pytest.mark.parametrize("what", SAVES)
def test_what_is_complete_is_on_the_disk(what: str, tmp_path: Path) -> None:
    injection = llama()
    for folder in (tmp_path / "one" / "two" / "new", tmp_path / "one" / "two" / "new", tmp_path / "one" / "other"):
        with recorded(tmp_path) as calls:
            SAVES[what](injection, folder)
        written = files(folder)
        assert written and not lost(calls, written)
        assert any(kind == "synced" for kind, _ in calls)
        stir(injection, seed=3)


def test_what_could_be_lost_is_found(tmp_path: Path) -> None:
    def told(do: Callable[[], object]) -> str:
        with recorded(tmp_path) as calls:
            do()
        return "; ".join(lost(calls, files(tmp_path)))

    def moved() -> None:
        (tmp_path / "a.partial").write_text("text")
        (tmp_path / "a.partial").rename(tmp_path / "a")

    said = told(moved)
    assert "the content of" in said and "the name in" in said
    assert not told(lambda: write_text(tmp_path / "b", "text"))
    assert "the content of" in told(lambda: (tmp_path / "c").write_text("text"))
    assert "the name in" in told(lambda: ((tmp_path / "d").mkdir(), write_tensors(tmp_path / "d" / "e", {}, {})))


def test_a_process_that_is_forked_during_a_save_does_not_keep_its_lock(tmp_path: Path) -> None:
    """A loader of data, for instance, that another thread starts."""
    with folder_lock(tmp_path):
        if not (child := os.fork()):
            signal.pause()
            os._exit(0)
    try:
        number = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(number)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
