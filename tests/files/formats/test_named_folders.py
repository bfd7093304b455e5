"""Folders that a file names: where they are, and the names of their tensors in the whole."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import peftcore
from peftcore.errors import CheckpointError
from peftcore.files.formats.named_folders import named_folder, of_part


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a file with others in it, and the working directory beside it."""
    for name in ("file/one", "file/both", "cwd/two", "cwd/both"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("one", "file/one"),
        ("./one", "file/one"),
        ("two", "cwd/two"),
        ("../cwd/two", "cwd/two"),
        ("gone/one", "file/one"),
        ("/gone/one", "file/one"),
        ("{here}/cwd/both", "cwd/both"),
    ],
)
def test_where_it_is(name: str, found: str, here: Path) -> None:
    place = named_folder(name.format(here=here), here / "file", here / "file/config.json")
    assert place.resolve() == (here / found).resolve()


def test_two_are_one_too_many(here: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"config.json names the adapter 'both', which matches .*file/both and .*cwd"
    ):
        named_folder("both", here / "file", here / "file/config.json")
    (here / "cwd/both").rmdir()
    os.symlink(here / "file/both", here / "cwd/both")
    assert named_folder("both", here / "file", here / "file/config.json") == (here / "file/both").resolve()


def test_from_a_hub_it_is_inside(here: Path) -> None:
    snapshot = here / "snapshots" / ("0a" * 20)
    (snapshot / "one").mkdir(parents=True)
    os.symlink(here / "cwd/two", snapshot / "link")
    for name in ("one", "./one", str(here / "file/one")):
        assert named_folder(name, snapshot, snapshot / "config.json").resolve() == (snapshot / "one").resolve()
    for name in ("two", "..", "../../file/one/..", "link", str(here / "cwd/two")):
        with pytest.raises(CheckpointError, match="no such folder"):
            named_folder(name, snapshot, snapshot / "config.json")


def test_tensors_of_parts_that_stand_apart_and_inside() -> None:
    """VeRA has shared state and stands beside LoRA in a union; merged LoRAs are children of another operator."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    union = peftcore.apply(model, ["lora", "vera"], target=["0"], name="union")
    merged = peftcore.apply(model, "task_arithmetic", target=["1"])
    for injection in (union, merged):
        for name, part in injection.parts.items():
            alone = part.state_dict()
            alone = {key if key.startswith("shared:") else f"{name}/{key}": value for key, value in alone.items()}
            held = of_part(alone, name, injection._surgeon)
            every = injection.state_dict()
            assert held and all(torch.equal(every[key], value) for key, value in held.items())
            assert all(every[key].data_ptr() == value.data_ptr() for key, value in held.items())
