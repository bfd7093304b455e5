"""`peftcore train` is killed at each of its writes and steps: ``--resume`` then ends as if nobody had killed it."""

import json
from pathlib import Path
from typing import Any

import pytest
from killed import MANY, killed_at_points
from silent import Silent

from peftcore_lab.runs.run import Run
from peftcore_lab.training.train import train

CLOCK = {"seconds", "seconds_per_step"}


def run(encoder: Path, csv_file: Path, **training: Any) -> Run:
    given = {"steps": 4, "batch_size": 4, "evaluate_every": 1, "learning_rate": 1e-2, **training}
    return Run.model_validate(
        {
            "model": str(encoder),
            "task": "text-classification",
            "data": {"train": str(csv_file)},
            "method": {"name": "lora", "rank": 2, "dropout": 0.1},
            "training": given,
            "out": "run",
        }
    )


def outcome() -> dict[str, Any]:
    """What a run came to, without the clock: its figures and the bytes of its adapter."""
    found = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    found = {name: value for name, value in found.items() if name not in CLOCK}
    return found | {"bytes": Path("run/adapter/adapter.safetensors").read_bytes().hex()}


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averages": {"ema": 0.9, "accumulate": 2},
    "patience": {"patience": 1, "steps": 8, "learning_rate": 0.5},
    "last": {"checkpoints": "last"},
    "no checkpoints": {"checkpoints": False},
}


def killed(encoder: Path, csv_file: Path, root: Path, way: str, count: int) -> None:
    asked = run(encoder, csv_file, **WAYS[way])
    points = killed_at_points(
        lambda: train(asked, Silent()),
        lambda: train(asked, Silent(), resume=Path("run").exists()),
        outcome,
        root,
        count,
    )
    assert "step" in points and any(point.startswith("half of") for point in points)


def test_a_killed_run_resumes_to_the_same_figures(encoder: Path, csv_file: Path, tmp_path: Path) -> None:
    killed(encoder, csv_file, tmp_path / "runs", "plain", 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_at_many_points(encoder: Path, csv_file: Path, tmp_path: Path, way: str) -> None:
    killed(encoder, csv_file, tmp_path / "runs", way, MANY)
