"""A fleet is killed at each write of its checkpoints and at each step: resumed, it ends as if nobody had killed it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fleet_toys import applied, llama, next_token, texts
from killed import MANY, killed_at_points
from safetensors.torch import load_file
from slowly import quick
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from peftcore.fleets import adapter_checkpoints
from peftcore.training import Fleet

FLEETS = {"lora": ["lora"], "adalora": ["adalora"], "both": ["lora", "adalora"]}


def trained(methods: list[str], resume: bool) -> None:
    fleet = Fleet(llama())
    for method in methods:
        injection = applied(fleet.model, method, method, dropout=0.1)
        optimizer = injection.optimizer(torch.optim.AdamW, lr=0.05, total_steps=4)
        fleet.join(
            injection,
            texts(1),
            loss=next_token,
            steps=4,
            folder=Path("fleet", method),
            save_every=1,
            optimizer=optimizer,
            schedule=CosineAnnealingLR(optimizer, 4) if method == "lora" else None,
            resume=resume,
        )
    fleet.run()


def outcome() -> dict[str, Any]:
    """Each member's losses, one for each step, and the tensors of its last checkpoint."""
    found: dict[str, Any] = {}
    for folder in Path("fleet").iterdir():
        place = adapter_checkpoints.newest(folder)
        assert place is not None
        state = adapter_checkpoints.read(place)
        found[f"{folder.name} {place.name}"] = {
            "losses": torch.tensor(state["losses"], dtype=torch.float64),
            **load_file(place / "training.safetensors"),
            **load_file(place / "adapter.safetensors"),
        }
    return found


def equal(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]], tolerance: float) -> bool:
    return one.keys() == other.keys() and all(
        one[place].keys() == other[place].keys()
        and all(torch.allclose(each, other[place][key], tolerance, tolerance) for key, each in one[place].items())
        for place in one
    )


@pytest.mark.parametrize("fleet", quick(FLEETS, ["lora"]))
def test_a_killed_fleet_resumes_to_the_same_values(fleet: str, tmp_path: Path) -> None:
    """To the bit, where members are in step; where one of them is ahead afterwards, their rows are in other calls."""
    methods = FLEETS[fleet]
    points = killed_at_points(
        lambda: trained(methods, False),
        lambda: trained(methods, True),
        outcome,
        tmp_path / "runs",
        2 if fleet == "lora" else 3 * MANY,
        same=lambda one, other: equal(one, other, 0.0 if len(methods) == 1 else 1e-9),
    )
    assert points.count("step") >= 4 * len(methods) and any("step-00000003" in point for point in points)
