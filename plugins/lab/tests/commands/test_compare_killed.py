"""`peftcore compare` is killed at each of its writes and steps: with ``--resume`` its trials are those of a comparison
that nobody killed, each once."""

import json
from pathlib import Path
from typing import Any

import pytest
from comparisons import MEASURED
from killed import MANY, killed_at_points
from silent import Silent

from peftcore_lab.comparisons.compare import compare
from peftcore_lab.comparisons.comparison import Comparison


def comparison(encoder: Path, csv_file: Path, **more: Any) -> Comparison:
    whole: dict[str, Any] = {
        "model": str(encoder),
        "data": {"train": str(csv_file)},
        "methods": "lora,bitfit",
        "seeds": [0],
        "training": {"steps": 2, "batch_size": 4, "evaluate_every": 1},
        "out": "out",
    }
    return Comparison.model_validate(whole | more)


def trials() -> dict[str, Any]:
    """What trials came to, without the clock, and the bytes of their adapters."""
    held = json.loads(Path("out/results.json").read_text(encoding="utf-8"))["trials"]
    told = [{name: value for name, value in each.items() if name not in MEASURED} for each in held]
    return {
        f"{number} {each['label']} {each['seed']}": each
        | {"bytes": Path("out", each["folder"], "adapter.safetensors").read_bytes().hex()}
        for number, each in enumerate(told)
    }


WAYS: dict[str, dict[str, Any]] = {
    "checkpoints": {"checkpoints": True, "together": 1},
    "together": {"together": 2, "seeds": [0, 1]},
    "rates": {"together": 2, "tune_lr": [1e-3, 1e-2]},
}


def killed(encoder: Path, csv_file: Path, root: Path, way: str, count: int) -> None:
    asked = comparison(encoder, csv_file, **WAYS[way])
    points = killed_at_points(
        lambda: compare(asked, Silent()), lambda: compare(asked, Silent(), resume=True), trials, root, count
    )
    assert any("trial.json" in point for point in points)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_at_many_points(encoder: Path, csv_file: Path, tmp_path: Path, way: str) -> None:
    killed(encoder, csv_file, tmp_path / "runs", way, MANY)


@pytest.mark.slow
def test_an_earlier_comparison_that_was_half_removed_is_not_gone_on_with(
    encoder: Path, csv_file: Path, tmp_path: Path
) -> None:
    """Killed while it removes the runs of an earlier one with the same settings."""
    asked = comparison(encoder, csv_file, methods="lora", checkpoints=True, together=1)
    killed_at_points(
        lambda: compare(asked, Silent()),
        lambda: compare(asked, Silent(), resume=True),
        trials,
        tmp_path / "runs",
        4,
        before=lambda: compare(asked, Silent()),
        among=lambda point: point.startswith(("os.remove", "os.rmdir")) and ".partial" not in point,
    )
