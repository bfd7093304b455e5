"""A comparison of two methods with two seeds each, and what its trials came to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from peftcore_lab.comparisons.comparison import Comparison
    from peftcore_lab.reports.trials import ComparisonReport

MEASURED = {"seconds_per_step", "peak_memory"}


@pytest.fixture
def comparison(encoder: Path, csv_file: Path, tmp_path: Path) -> Comparison:
    from peftcore_lab.comparisons.comparison import Comparison

    whole: dict[str, Any] = {
        "model": str(encoder),
        "data": {"train": str(csv_file)},
        "methods": "lora,bitfit",
        "seeds": [0, 1],
        "training": {"steps": 6, "batch_size": 8, "evaluate_every": 2},
        "checkpoints": True,
        "out": tmp_path / "out",
    }
    return Comparison.model_validate(whole)


def found(report: ComparisonReport) -> list[dict[str, Any]]:
    """Return what trials came to, without what the clock says."""
    trials = json.loads(report.as_json())["trials"]
    return [{name: value for name, value in each.items() if name not in MEASURED} for each in trials]
