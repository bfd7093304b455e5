"""On a Ray cluster of this machine, with two workers, runs come to what they come to here; a worker that is killed in
the middle of a run loses what came after its last checkpoint, and nothing else."""

from pathlib import Path

import psutil
import pytest
from comparisons import found
from on_this_machine import Kills
from optuna.trial import TrialState
from searches import written
from silent import Silent

from peftcore.errors import BadInput, TrainingError
from peftcore_lab.comparisons.compare import compare
from peftcore_lab.comparisons.comparison import Comparison
from peftcore_lab.comparisons.comparison_on_ray import OnRay, _taken
from peftcore_lab.comparisons.running import Job
from peftcore_lab.runs.reading import load
from peftcore_lab.searching.search import Search, SearchRun, candidate_of
from peftcore_lab.searching.search_on_ray import search_on_ray

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


def test_runs_come_to_the_same_and_one_that_is_killed_goes_on(comparison: Comparison) -> None:
    training = comparison.training.model_copy(update={"steps": 300, "evaluate_every": 100})
    comparison = comparison.model_copy(update={"training": training})
    alone = compare(comparison.model_copy(update={"out": comparison.out / "here"}), Silent())
    watch = Kills(comparison.out / "runs", "*/", "ray::_job")
    watch.start()
    report = compare(comparison, Silent(), place=OnRay())
    watch.assert_went_on()
    assert found(report) == found(alone)
    assert not report.failed


def test_what_a_task_says_is_said_here(comparison: Comparison) -> None:
    job = Job((comparison.methods[0],), 0)

    @ray.remote(max_retries=0)
    def refused() -> None:
        raise BadInput("no column label")

    with pytest.raises(BadInput, match="no column label"):
        _taken(refused.remote(), job)

    @ray.remote(max_retries=0)
    def dies() -> None:
        psutil.Process().kill()

    (lost,), _ = _taken(dies.remote(), job)
    assert isinstance(lost, TrainingError) and "its worker was lost" in str(lost)


def test_trials_of_a_search_run_there(encoder: Path, csv_file: Path, tmp_path: Path) -> None:
    """Of one study, which workers share; each trial comes to what the same configuration comes to here."""
    file = written(tmp_path / "search.yaml", encoder, csv_file, trials=6, seeds=[0, 1], out="out")
    what = Search.model_validate({**load(file), "out": tmp_path / "out"})
    found = search_on_ray(what, Silent(), OnRay())
    assert sum(each.state is TrialState.COMPLETE for each in found.trials) == 6
    assert len(found.report.trials) == 2
    first = found.tried.entries()[0]
    alone = what.comparison(SearchRun(what, Silent()).tuning, [candidate_of(first)], [0], tmp_path / "alone")
    (trial,) = compare(alone, Silent()).trials
    assert (trial.after, trial.losses) == (first.trials[0].after, [tuple(each) for each in first.trials[0].losses])


def test_a_cluster_that_is_not_there(comparison: Comparison) -> None:
    ray.shutdown()
    with pytest.raises(BadInput, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        compare(comparison, Silent(), place=OnRay("127.0.0.1:1"))
