"""The files from which an adapter's training goes on."""

from pathlib import Path

import pytest
import torch
from fleet_toys import applied, llama

import peftcore
from peftcore.errors import CheckpointError, TrainingError
from peftcore.fleets import checkpoints


def test_the_newest_is_found_and_older_ones_go(tmp_path: Path) -> None:
    injection = applied(llama(), "lora", "a")
    assert checkpoints.newest(tmp_path / "nothing") is None
    first = checkpoints.write(injection, {"x": 1}, tmp_path, 5)
    assert checkpoints.newest(tmp_path) == first
    (tmp_path / "step-00000099.partial").mkdir()  # of a process that was killed
    second = checkpoints.write(injection, {"x": torch.ones(2)}, tmp_path, 10)
    assert checkpoints.newest(tmp_path) == second and [*tmp_path.iterdir()] == [second]
    assert torch.equal(checkpoints.read(second)["x"], torch.ones(2))
    assert checkpoints.write(injection, {"x": 3}, tmp_path, 10) == second  # the same step of the same training


def test_the_adapter_in_it_is_one_like_any_other(tmp_path: Path) -> None:
    injection = applied(llama(), "dora", "a")
    place = checkpoints.write(injection, {}, tmp_path, 1)
    loaded = peftcore.load(llama(), place)
    torch.testing.assert_close(loaded.state_dict(), injection.state_dict(), rtol=0, atol=0)
    fresh = peftcore.apply(llama(), "dora", dtype=torch.float64)
    checkpoints.put(fresh, checkpoints.values_of(fresh, place))
    torch.testing.assert_close(fresh.state_dict(), injection.state_dict(), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="another adapter"):
        checkpoints.values_of(peftcore.apply(llama(), "dora", rank=3), place)


def test_only_data_is_written(tmp_path: Path) -> None:
    injection = applied(llama(), "lora", "a")
    with pytest.raises(TrainingError, match="running code"):
        checkpoints.write(injection, {"x": Path()}, tmp_path, 1)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("content", [b"", b"broken", b"\x80\x02}q\x00."])
def test_a_damaged_state_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / checkpoints.STATE).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.read(tmp_path)
