"""The files from which an adapter's training goes on."""

from pathlib import Path

import pytest
import torch
from fleet_toys import applied, llama

import peftcore
from peftcore.errors import CheckpointError, TrainingError
from peftcore.fleets import adapter_checkpoints


def test_the_newest_is_found_and_older_ones_go(tmp_path: Path) -> None:
    injection = applied(llama(), "lora", "a")
    assert adapter_checkpoints.newest(tmp_path / "nothing") is None
    first = adapter_checkpoints.write(injection, {"x": 1}, tmp_path, 5, "one")
    assert adapter_checkpoints.newest(tmp_path) == first
    (tmp_path / "step-00000099.partial").mkdir()  # of a process that was killed
    second = adapter_checkpoints.write(injection, {"x": torch.ones(2)}, tmp_path, 10, "one")
    assert adapter_checkpoints.newest(tmp_path) == second and [*tmp_path.glob("step-*")] == [second]
    assert torch.equal(adapter_checkpoints.read(second)["x"], torch.ones(2))


def test_a_step_is_written_again_and_what_is_killed_meanwhile_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    injection = applied(llama(), "lora", "a")
    place = adapter_checkpoints.write(injection, {"x": 1}, tmp_path, 10, "one")
    with torch.no_grad():
        next(injection.parameters()).fill_(3.0)
    assert adapter_checkpoints.write(injection, {"x": 2}, tmp_path, 10, "one") == place
    assert [*tmp_path.glob("step-*")] == [place] and adapter_checkpoints.read(place)["x"] == 2
    assert next(peftcore.load(llama(), place).parameters()).unique().item() == 3.0
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.suffix == adapter_checkpoints.PARTIAL:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        adapter_checkpoints.write(injection, {"x": 3}, tmp_path, 10, "one")
    assert not [*tmp_path.glob(f"*{adapter_checkpoints.PARTIAL}")]
    held = adapter_checkpoints.newest(tmp_path)
    assert held is not None and held != place and adapter_checkpoints.read(held)["x"] == 2
    adapter_checkpoints.write(injection, {"x": 4}, tmp_path, 10, "one")
    assert adapter_checkpoints.newest(tmp_path) == place and [*tmp_path.glob("step-*")] == [place]


def test_a_folder_is_one_trainings(tmp_path: Path) -> None:
    injection = applied(llama(), "lora", "a")
    place = adapter_checkpoints.write(injection, {"x": 1}, tmp_path, 10, "one")
    for step in (10, 20):
        with pytest.raises(TrainingError, match=r"earlier training.*pass another folder"):
            adapter_checkpoints.write(injection, {"x": 2}, tmp_path, step, "two")
    assert [*tmp_path.glob("step-*")] == [place] and adapter_checkpoints.read(place)["x"] == 1
    adapter_checkpoints.claim(tmp_path, "two", takes_over=True)
    later = adapter_checkpoints.write(injection, {"x": 3}, tmp_path, 20, "two")
    with pytest.raises(TrainingError, match="or one that still runs"):
        adapter_checkpoints.write(injection, {"x": 4}, tmp_path, 30, "one")
    assert [*tmp_path.glob("step-*")] == [later]
    adapter_checkpoints.claim(tmp_path / "begun", "one")
    with pytest.raises(TrainingError, match="belongs to"):
        adapter_checkpoints.claim(tmp_path / "begun", "two")


def test_the_adapter_in_it_is_one_like_any_other(tmp_path: Path) -> None:
    injection = applied(llama(), "dora", "a")
    place = adapter_checkpoints.write(injection, {}, tmp_path, 1, "one")
    loaded = peftcore.load(llama(), place)
    torch.testing.assert_close(loaded.state_dict(), injection.state_dict(), rtol=0, atol=0)
    fresh = peftcore.apply(llama(), "dora", dtype=torch.float64)
    adapter_checkpoints.put(fresh, adapter_checkpoints.values_of(fresh, place))
    torch.testing.assert_close(fresh.state_dict(), injection.state_dict(), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="another adapter"):
        adapter_checkpoints.values_of(peftcore.apply(llama(), "dora", rank=3), place)


def test_only_data_is_written(tmp_path: Path) -> None:
    injection = applied(llama(), "lora", "a")
    with pytest.raises(TrainingError, match="saved as plain data"):
        adapter_checkpoints.write(injection, {"x": Path()}, tmp_path, 1, "one")
    assert not [*tmp_path.iterdir()]


def test_what_optimizers_remember_comes_back_as_it_was(tmp_path: Path) -> None:
    """Keys that are numbers, tuples, no number, tensors of all dtypes and shapes, and nothing."""
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3, dtype=torch.float64)}, 1: {}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "amsgrad": False}],
        "best": float("inf"),
        "count": torch.tensor(7),
        "empty": [],
    }
    place = adapter_checkpoints.write(applied(llama(), "lora", "a"), state, tmp_path, 1, "one")
    found = adapter_checkpoints.read(place)
    assert torch.equal(found["state"][0].pop("exp_avg"), state["state"][0].pop("exp_avg"))  # type: ignore[index]
    assert found["state"][0]["step"].shape == () and found["count"].dtype == torch.int64
    assert found == state and type(found["param_groups"][0]["betas"]) is tuple


@pytest.mark.parametrize(
    "content", [b"", b"broken", b"\x80\x02}q\x00.", b"[]", b"{}", b'{"pairs": 3}', b'{"tensor": "x"}']
)
@pytest.mark.parametrize("name", [adapter_checkpoints.STATE, adapter_checkpoints.STATE_TENSORS])
def test_a_damaged_state_is_one_error(tmp_path: Path, name: str, content: bytes) -> None:
    place = adapter_checkpoints.write(applied(llama(), "lora", "a"), {"x": torch.ones(2)}, tmp_path, 1, "one")
    (place / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        adapter_checkpoints.read(place)
