"""A comparison that was stopped goes on: what is finished is taken as it is, and a run that was begun goes on from its
last checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparisons import found
from silent import Silent

from peftcore.errors import BadInput
from peftcore_lab.comparisons import running
from peftcore_lab.comparisons.compare import compare
from peftcore_lab.comparisons.comparison import Comparison
from peftcore_lab.comparisons.running import RECORD, jobs_of


@pytest.mark.slow
def test_finished_runs_are_taken_as_they_are(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(comparison, Silent())
    with monkeypatch.context() as patch:
        patch.setattr(running, "train", lambda *_: pytest.fail("nothing is left to train"))
        assert found(compare(comparison, Silent(), resume=True)) == found(first)
    asked: list[str] = []
    working = running.train

    def counted(run: Any, *rest: Any) -> Any:
        asked.append(run.out.name)
        return working(run, *rest)

    monkeypatch.setattr(running, "train", counted)
    longer = comparison.model_copy(update={"seeds": [1, 2]})
    compare(longer, Silent(), resume=True)
    assert asked == ["lora-2", "bitfit-2"]
    asked.clear()
    other = comparison.training.model_copy(update={"learning_rate": 3e-3})
    compare(comparison.model_copy(update={"training": other, "seeds": [0, 1]}), Silent(), resume=True)
    assert asked == ["lora-0", "lora-1", "bitfit-0", "bitfit-1"]


def stopping(step: int) -> Callable[..., Any]:
    """A display that interrupts the second run in a step."""

    class Stops(Silent):
        begun, steps = 0, 0

        def begin(self, label: str) -> None:
            self.begun, self.steps = self.begun + 1, 0

        def advance(self) -> None:
            self.steps += 1
            if self.begun == 2 and self.steps == step:
                raise KeyboardInterrupt

    return Stops


@pytest.mark.slow
def test_a_run_goes_on_from_its_last_checkpoint(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes to the same as without an interruption, and the steps before the checkpoint are not trained again."""
    whole = found(compare(comparison, Silent()))
    with pytest.raises(KeyboardInterrupt):
        compare(comparison, stopping(5)())
    runs = comparison.out / "runs"
    assert [each.name for each in sorted(runs.glob(f"*/{RECORD}"))] == [RECORD] * 3  # one anew, two of before
    assert {each.name for each in (runs / "lora-1" / "checkpoints").iterdir()} >= {"checkpoint-4"}
    steps: list[int] = []

    class Counts(Silent):
        def begin(self, label: str) -> None:
            steps.append(0)

        def advance(self) -> None:
            steps[-1] += 1

    for each in ("bitfit-0", "bitfit-1"):
        (runs / each / RECORD).unlink()
    assert found(compare(comparison, Counts(), resume=True)) == whole
    assert steps[0] == 2


def test_jobs_are_in_order(comparison: Comparison) -> None:
    names = [(job.candidates[0].called, job.seed) for job in jobs_of(comparison)]
    assert names == [("lora", 0), ("lora", 1), ("bitfit", 0), ("bitfit", 1)]
    several = comparison.model_copy(update={"together": 2, "checkpoints": False})
    assert [(len(job.candidates), job.seed) for job in jobs_of(several)] == [(2, 0), (2, 1)]


def test_a_damaged_record_is_none(comparison: Comparison) -> None:
    alone = comparison.model_copy(update={"seeds": [0], "methods": comparison.methods[1:]})
    compare(alone, Silent())
    run = alone.run(alone.methods[0], 0)
    assert running.recorded(run) is not None
    (run.out / RECORD).write_text("{", encoding="utf-8")
    assert running.recorded(run) is None
    (run.out / "run.json").write_text("[]", encoding="utf-8")
    assert not running.holds(run)


def test_runs_on_data_that_changed_are_trained_again(
    comparison: Comparison, csv_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = comparison.model_copy(update={"methods": comparison.methods[:1], "seeds": [0]})
    first = compare(one, Silent())
    asked: list[bool] = []
    working = running.train
    monkeypatch.setattr(running, "train", lambda *given: (asked.append(given[-1]), working(*given))[1])
    compare(one, Silent(), resume=True)
    assert asked == []
    csv_file.write_bytes(csv_file.read_bytes() + b"".join(csv_file.read_bytes().splitlines(keepends=True)[1:]))
    again = compare(one, Silent(), resume=True)
    assert asked == [False] and again.train_size > first.train_size  # anew, and from no checkpoint


def test_two_runs_never_share_a_folder(comparison: Comparison) -> None:
    """Labels that differ in signs that names of folders lack: the second run removed the first."""
    labels = [comparison.methods[0].model_copy(update={"label": label}) for label in ("r 8", "r:8")]
    with pytest.raises(BadInput, match=r"r 8 and r:8 would share the folder .*r-8-0"):
        compare(comparison.model_copy(update={"methods": labels}), Silent())
