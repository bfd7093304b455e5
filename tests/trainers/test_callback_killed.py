"""The Trainer is killed at each write of its checkpoints and at each step: from its last whole checkpoint it goes on as
if nobody had killed it, and a checkpoint that was cut off is refused."""

import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
import transformers
from killed import MANY, killed_at_points
from safetensors import SafetensorError
from safetensors.torch import load_file
from training_hosts import host, trainer

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.training import PeftcoreCallback

STATE = "trainer_state.json"
REFUSED = (OSError, ValueError, EOFError, RuntimeError, UnpicklingError, SafetensorError, PeftcoreError)
"""What reading a file raises that was cut off."""


def trained(resume: bool) -> None:
    model = host("bert")
    injection = peftcore.apply(model, "adalora", seed=0, train=["classifier"], target_rank=4)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.05)
    run = trainer(
        model, "bert", Path("run"), [PeftcoreCallback()], optimizers=(optimizer, None), save_steps=1, save_total_limit=2
    )
    place = transformers.trainer_utils.get_last_checkpoint("run") if resume and Path("run").exists() else None
    if place is not None and not whole(Path(place)):
        with pytest.raises(REFUSED):
            run.train(resume_from_checkpoint=place)
        shutil.rmtree(place)
        return trained(resume)
    run.train(resume_from_checkpoint=place)
    torch.save({"state": injection.state_dict(), "log": run.state.global_step}, "end.pt")
    return None


def whole(place: Path) -> bool:
    """Whether all files of a checkpoint can be read: the Trainer may have been killed while it wrote over an older
    one."""
    try:
        transformers.TrainerState.load_from_json(str(place / STATE))
        for each in place.glob("*.safetensors"):
            load_file(each)
        for each in place.glob("*.pt*"):
            torch.load(each, weights_only=False)
    except REFUSED:
        return False
    return True


def outcome() -> dict[str, Any]:
    held = torch.load("end.pt")
    return {key: value.tolist() for key, value in held["state"].items()} | {"steps": held["log"]}


def killed(root: Path, count: int) -> None:
    points = killed_at_points(lambda: trained(False), lambda: trained(True), outcome, root, count)
    assert any("adapter.safetensors" in point for point in points) and any(STATE in point for point in points)


def test_a_killed_trainer_resumes_to_the_same_values(tmp_path: Path) -> None:
    killed(tmp_path / "runs", 3)


@pytest.mark.slow
def test_at_many_points(tmp_path: Path) -> None:
    killed(tmp_path / "runs", 4 * MANY)
