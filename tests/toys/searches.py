"""Searches whose runs take no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from silent import Silent

from peftcore_lab.comparisons.running import Ran
from peftcore_lab.reports.trials import Trial
from peftcore_lab.runs.reading import load

if TYPE_CHECKING:
    from peftcore_lab.searching.search import SearchRun

BUDGET = 170
SPACE = "{lora: {rank: [1, 2, 4], target: [attn.q, all-linear], depth: [1.0, 0.5]}, ia3: {}, bitfit: {}}"


def written(path: Path, model: Path, data: Path, **more: object) -> Path:
    whole = {
        "model": str(model),
        "data": {"train": str(data)},
        "training": {"steps": 2, "batch_size": 8},
        "together": 1,
    }
    whole |= more
    path.write_text(json.dumps(whole)[:-1] + f', "methods": {SPACE}}}', encoding="utf-8")
    return path


@pytest.fixture
def instant(monkeypatch) -> list[str]:
    """Runs take no time; the higher the learning rate, the better. The labels of those that were asked for."""
    from peftcore_lab.searching import search as job

    asked: list[str] = []

    def run_trial(comparison, candidate, seed, board):
        asked.append(candidate.called)
        score = {"accuracy": min(1.0, 5 * candidate.learning_rate)}
        costs = {"seconds_per_step": 0.1, "peak_memory": 1, "file_size": 1, "folder": ""}
        sizes = {"trainable": 100, "total": 1000, "curve": [], "losses": []}
        rate, options = candidate.learning_rate, candidate.arguments
        trial = Trial(
            candidate.called, candidate.name, options, seed, rate, before=score, after=score, **sizes, **costs
        )
        return Ran(trial, 8, 8, None)

    monkeypatch.setattr(job, "run_trial", run_trial)
    monkeypatch.setattr(job, "POLL", 0.01)
    return asked


@pytest.fixture
def file(encoder, csv_file, tmp_path) -> Path:
    return written(tmp_path / "search.yaml", encoder, csv_file, budget=BUDGET, trials=6, storage="study.log", out="out")


def searched(file: Path, **more: object) -> SearchRun:
    from peftcore_lab.searching.search import Search, SearchRun

    return SearchRun(Search.model_validate(load(file) | more), Silent())
