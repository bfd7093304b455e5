"""Which run a folder holds: its options, and what its files contain."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from peftcore.errors import BadInput
from peftcore_lab.runs.folder import RUN, RunFolder, forget, holds
from peftcore_lab.runs.run import Run


class Builder(NamedTuple):
    hash: str


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, Any]:
    for name in ("rows.csv", "scored.csv", "model/config.json", "adapter/adapter.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}", encoding="utf-8")
    return {
        "model": str(tmp_path / "model"),
        "task": "text-classification",
        "data": {"train": str(tmp_path / "rows.csv"), "held_out": str(tmp_path / "scored.csv")},
        "method": {"name": "lora", "alpha": 8},
        "training": {"steps": 4},
        "out": tmp_path / "run",
    }


def begun(run: Run) -> None:
    folder = RunFolder(run)
    assert folder.checkpoint(False) is None
    folder.note()


def test_the_same_run_goes_on(whole: dict[str, Any]) -> None:
    run = Run.model_validate(whole)
    begun(run)
    assert holds(run) and RunFolder(run).checkpoint(True) is None
    longer = Run.model_validate({**whole, "training": {"steps": 9}})
    folder = RunFolder(longer)
    assert folder.checkpoint(True) is None and folder.longer and not holds(longer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"name": "lora", "alpha": 99}}, "method.alpha was 8 and is 99"),
        ({"method": {"name": "dora", "alpha": 8}}, "method.name was 'lora' and is 'dora'"),
        ({"training": {"steps": 4, "seed": 3}}, "training.seed was 0 and is 3"),
        ({"training": {"steps": 9, "clip": 0.5}}, "training.steps was 4 and is 9; training.clip was 1.0 and is 0.5"),
        ({"dtype": "bfloat16"}, "dtype was 'float32' and is 'bfloat16'"),
    ],
    ids=str,
)
def test_what_differs_is_named(whole: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    begun(Run.model_validate(whole))
    other = Run.model_validate({**whole, **changes})
    assert not holds(other)
    with pytest.raises(BadInput, match=f"holds another run: {words}.*--out"):
        RunFolder(other).checkpoint(True)


@pytest.mark.parametrize(
    ("file", "words"),
    [("rows.csv", "data.train"), ("scored.csv", "data.held_out"), ("model/config.json", "model")],
)
def test_a_run_whose_files_changed_is_another_one(whole: dict[str, Any], tmp_path: Path, file: str, words: str) -> None:
    run = Run.model_validate(whole)
    begun(run)
    (tmp_path / file).write_text("x", encoding="utf-8")
    assert not holds(run)
    with pytest.raises(BadInput, match=f"the content of {words} changed"):
        RunFolder(run).checkpoint(True)


def test_a_run_whose_dataset_on_the_hub_changed_is_another_one(
    whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.model_validate({**whole, "data": {"train": "someone/texts"}})
    monkeypatch.setattr("peftcore_lab.data.example_sources.datasets.load_dataset_builder", lambda name: Builder("one"))
    begun(run)
    assert holds(run)
    monkeypatch.setattr("peftcore_lab.data.example_sources.datasets.load_dataset_builder", lambda name: Builder("two"))
    assert not holds(run)
    with pytest.raises(BadInput, match=r"the content of data\.train changed"):
        RunFolder(run).checkpoint(True)


def test_a_run_that_was_killed_before_its_settings_were_written_begins(whole: dict[str, Any]) -> None:
    """And no other folder does: it may be the wrong one."""
    run = Run.model_validate(whole)
    with pytest.raises(BadInput, match="holds no run to resume"):
        RunFolder(run).checkpoint(True)
    (run.out / f".{RUN}.1.partial").mkdir(parents=True)
    (run.out / "checkpoints").mkdir()  # which the Trainer makes
    assert RunFolder(run).checkpoint(True) is None
    (run.out / "something").touch()
    with pytest.raises(BadInput, match="holds no run to resume"):
        RunFolder(run).checkpoint(True)


def test_a_run_that_is_removed_is_first_not_recognized(whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.model_validate(whole)
    begun(run)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # here it is killed
        forget(run.out)
    assert run.out.exists() and not holds(run)
    forget(run.out)
    forget(run.out)
    assert not run.out.exists()
