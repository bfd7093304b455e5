"""A search: workers share one study, lost trials are tried again, and what is too large is not trained."""

import os
import signal
import threading

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from searches import searched

from peftcore.errors import BadInput, TrainingError
from peftcore_lab.comparisons.comparison import Candidate
from peftcore_lab.searching import search as job
from peftcore_lab.searching import studies


@pytest.mark.parametrize("storage", ["study.log", "sqlite:///study.db"])
@pytest.mark.slow
def test_two_workers_share_one_study_and_its_number_of_trials(file, instant, storage):
    jobs = [searched(file, storage=storage) for _ in range(2)]
    threads = [threading.Thread(target=each.work) for each in jobs]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    trained = [each for each in jobs[0].study.trials() if each.state is optuna.trial.TrialState.COMPLETE]
    assert len(trained) == len(instant) == len(set(instant)) == 6
    assert jobs[1].study.trials() == jobs[0].study.trials()


def points(of: job.SearchRun) -> list[dict]:
    return [each.params for each in of.study.trials()]


def test_one_worker_finds_the_same_again_and_goes_on_where_it_stopped(file, instant):
    once, parts, other = (
        searched(file, storage="a.log"),
        searched(file, storage="b.log", trials=3),
        searched(file, storage="c.log", seed=1),
    )
    for each in (once, parts, other):
        each.work()
    again = searched(file, storage="b.log")
    again.work()
    assert points(again) == points(once) != points(other)


def test_the_trial_of_a_lost_worker_is_given_up_and_its_point_tried_again(file, instant, monkeypatch):
    first = searched(file)
    lost = optuna.load_study(study_name="search", storage=JournalStorage(JournalFileBackend("study.log"))).ask()
    first.space.suggest(lost)
    lost.set_user_attr(studies.KEY, "its point is drawn")  # and here it is killed
    first.work()
    assert len(instant) == 5, "the sixth is still thought to be running"
    monkeypatch.setattr(studies, "GRACE", 0.0)
    first.study.bury()
    first.work()
    tried = first.study.trials()
    assert studies.LOST in tried[0].user_attrs and len(instant) == 6
    assert sum(each.params == lost.params for each in tried) == 2


@pytest.mark.parametrize("drawn", [False, True])
def test_a_search_that_begins_alone_does_not_wait_for_lost_trials(file, instant, drawn):
    """Its points are those of a search without any; a point that was half drawn is drawn anew."""
    whole, cut = searched(file, storage="whole.log"), searched(file, storage="cut.log", trials=3)
    whole.work()
    cut.work()
    cut = searched(file, storage="cut.log")
    if not (worker := os.fork()):
        with cut.study.trial() as trial:
            if drawn:
                cut._chosen(trial)
            else:
                trial.suggest_categorical("method", cut.space.methods)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(worker, 0)
    del cut
    with open("cut.log", "ab") as journal:
        journal.write(b'{"op_code":')
    os.symlink("cut.log", "cut.log.lock")
    again = searched(file, storage="cut.log")
    again.work()
    tried = [each.params for each in again.study.trials() if studies.LOST not in each.user_attrs]
    assert tried == points(whole) and len(tried) == len(again.study.trials()) - 1


def test_an_interrupted_trial_is_tried_again(file, instant, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "run_trial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            searched(file).work()
    again = searched(file)
    again.work()
    stopped = next(each for each in again.study.trials() if studies.LOST in each.user_attrs)
    assert len(instant) == 6 and points(again).count(stopped.params) == 2


def test_training_that_fails_is_a_trial_and_no_pick(file, instant, monkeypatch):
    working = job.run_trial

    def failing(comparison, candidate, seed, board):
        if candidate.learning_rate > 0.01:
            raise TrainingError("the loss became nan")
        return working(comparison, candidate, seed, board)

    monkeypatch.setattr(job, "run_trial", failing)
    found = searched(file)
    found.work()
    states = [each.state.name for each in found.study.counted()]
    assert len(states) == 6 and set(states) == {"FAIL", "COMPLETE"}
    failed = next(each for each in found.study.counted() if each.state.name == "FAIL")
    assert failed.user_attrs[studies.REASON] == "the loss became nan"


def test_a_limit_of_memory_is_that_of_one_trial(file, instant):
    assert searched(file, storage="a.log", together=3).search.at_once == 3
    assert searched(file, storage="b.log", memory="1GB").search.at_once == 1
    with pytest.raises(BadInput, match="remove memory or together"):
        searched(file, storage="c.log", memory="1GB", together=2)


@pytest.mark.slow
def test_memory_is_a_limit_too(file, instant):
    free = searched(file, memory="1GB", storage="a.log")
    needs = [free.planner.needs(Candidate(name="lora", rank=rank, target="attn.q")) for rank in (1, 4)]
    assert 0 < needs[0].memory < needs[1].memory
    tight = searched(file, budget=None, memory=f"{needs[0].memory}B", storage="b.log")
    tight.work()
    assert instant and any("of memory" in each.user_attrs.get(studies.REASON, "") for each in tight.study.trials())


def test_another_search_does_not_go_on_with_a_study(file, instant):
    searched(file)
    with pytest.raises(BadInput, match=r"of another search: budget was 170 and is 100; training.steps was 2 and is 3"):
        searched(file, budget=100, training={"steps": 3})
    searched(file, budget=100, study="another", trials=1)


def test_a_search_whose_data_changed_is_another_one(file, csv_file, instant):
    searched(file)
    csv_file.write_bytes(csv_file.read_bytes() + csv_file.read_bytes().splitlines(keepends=True)[-1])
    with pytest.raises(BadInput, match=r"data\.train changed since"):
        searched(file)
