"""A search is killed at each of its writes, and goes on: its trials, its pick and its report are those of a search that
nobody killed, and no trial counts twice."""

import json
from pathlib import Path
from typing import Any

import pytest
from comparisons import MEASURED
from killed import MANY, killed_at_points
from searches import searched, written


def found() -> dict[str, Any]:
    """What a search came to, without the clock and the numbers of its trials."""
    held = json.loads(Path("out/search.json").read_text(encoding="utf-8"))
    counted = [each for each in held["trials"] if each["state"] == "trained"]
    keys = ("parameters", "score", "trainable")
    unnamed = {*MEASURED, "label", "folder"}
    return {
        "trials": [{key: each[key] for key in keys} for each in counted],
        "lost": {each["state"] for each in held["trials"]} - {"trained", "skipped", "lost"},
        "pick": {name: each for name, each in held["pick"].items() if name != "label"},
        "report": [
            {name: value for name, value in each.items() if name not in unnamed} for each in held["report"]["trials"]
        ],
    }


def killed(file: Path, root: Path, count: int, **more: Any) -> None:
    def search() -> None:
        Path("out/search").mkdir(parents=True, exist_ok=True)  # which trials that take no time leave out
        searched(file).finish()

    points = killed_at_points(search, search, found, root, count, **more)
    assert any("study.log" in point for point in points)


def file(encoder: Path, csv_file: Path, tmp_path: Path, **more: Any) -> Path:
    start = [{"name": "lora", "rank": 2, "target": "attn.q", "depth": 1.0}]
    asked = {"trials": 5, "storage": "study.log", "out": "out", "seeds": [0], "confirm": 1, "start": start}
    return written(tmp_path / "search.yaml", encoder, csv_file, **{**asked, **more})


def test_a_killed_search_goes_on_to_the_same_pick(encoder: Path, csv_file: Path, instant: Any, tmp_path: Path) -> None:
    killed(file(encoder, csv_file, tmp_path), tmp_path / "runs", 1, among=lambda point: "study.log" in point)


@pytest.mark.slow
@pytest.mark.parametrize("trials", [5, 14])
def test_at_many_points(encoder: Path, csv_file: Path, instant: Any, tmp_path: Path, trials: int) -> None:
    killed(file(encoder, csv_file, tmp_path, trials=trials), tmp_path / "runs", MANY)


@pytest.mark.slow
def test_at_many_points_of_trials_that_train_together(encoder: Path, csv_file: Path, tmp_path: Path) -> None:
    killed(file(encoder, csv_file, tmp_path, together=2, seeds=[0, 1]), tmp_path / "runs", MANY)
