"""A fleet is killed at each write of its checkpoints and at each step: a resumed one ends as if nobody had killed it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fleet_toys import applied, llama, next_token, texts
from killed import MANY, killed_at_points
from torch.optim.lr_scheduler import CosineAnnealingLR

from peftcore.fleets import adapter_checkpoints
from peftcore.training import Fleet


def trained(resume: bool) -> None:
    fleet = Fleet(llama(attention_dropout=0.1))
    for name, method in (("a", "lora"), ("b", "adalora")):
        injection = applied(fleet.model, method, name, dropout=0.1)
        optimizer = injection.optimizer(torch.optim.AdamW, lr=0.05, total_steps=4)
        fleet.join(
            injection,
            texts(1),
            loss=next_token,
            steps=4,
            folder=Path("fleet", name),
            save_every=1,
            optimizer=optimizer,
            schedule=CosineAnnealingLR(optimizer, 4) if name == "a" else None,
            resume=resume,
        )
    fleet.run()


def outcome() -> dict[str, Any]:
    """Each member's losses, one for each step, and the bytes of all that its last checkpoint holds."""
    found: dict[str, Any] = {}
    for name in ("a", "b"):
        place = adapter_checkpoints.newest(Path("fleet", name))
        assert place is not None
        others = [each.name for each in place.parent.iterdir() if each != place and ".owner.json." not in each.name]
        state = adapter_checkpoints.read(place)
        files = {each.name: each.read_bytes().hex() for each in place.iterdir() if each.suffix == ".safetensors"}
        found[name] = {"losses": state["losses"], "place": place.name, "files": files, "others": others}
    return found


def killed(root: Path, count: int) -> None:
    points = killed_at_points(lambda: trained(False), lambda: trained(True), outcome, root, count)
    assert points.count("step") == 8 and any("step-00000003" in point for point in points)


def test_a_killed_fleet_resumes_to_the_same_values(tmp_path: Path) -> None:
    killed(tmp_path / "runs", 4)


@pytest.mark.slow
def test_at_many_points(tmp_path: Path) -> None:
    killed(tmp_path / "runs", 4 * MANY)
