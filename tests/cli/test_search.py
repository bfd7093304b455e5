"""``peftcore search``: what it tries, what it leaves out, what it picks by, and that workers share one study."""

import json
import threading
from pathlib import Path

import datasets
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from silent import Silent
from typer.testing import CliRunner

from peftcore.cli.commands import app
from peftcore.comparing.comparisons.compare import Candidate
from peftcore.comparing.errors import BadInput
from peftcore.comparing.reports.trials import Trial
from peftcore.comparing.searching import search as job
from peftcore.comparing.searching import studies
from peftcore.comparing.searching.budget import memory, values
from peftcore.errors import TrainingError

BUDGET = 170
SPACE = "{lora: {rank: [1, 2, 4], target: [attn.q, all-linear], depth: [1.0, 0.5]}, ia3: {}, bitfit: {}}"


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


def written(path: Path, model: Path, data: Path, **more: object) -> Path:
    whole = {"model": str(model), "data": {"train": str(data)}, "training": {"steps": 2, "batch_size": 8}} | more
    path.write_text(json.dumps(whole)[:-1] + f', "methods": {SPACE}}}', encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory, rows) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("search")
    data = folder / "texts.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    torch.set_num_threads(1)
    start = [{"name": "lora", "rank": 2, "target": "attn.q", "learning_rate": 0.01}]
    file = written(folder / "search.yaml", encoder, data, budget=BUDGET, trials=4, confirm=1, seeds=[0, 1], start=start)
    result = invoke(file, "--json", "--out", folder / "out")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), folder / "out"


def trials(found: dict, state: str) -> list[dict]:
    return [each for each in found["trials"] if each["state"] == state]


def test_only_what_is_within_the_budget_is_trained(finished):
    found, out = finished
    assert json.loads((out / "search.json").read_text()) == found
    assert len(trials(found, "trained")) == 4
    assert all(each["trainable"] <= BUDGET for each in trials(found, "trained"))
    assert set(found["left_out"]) == {"bitfit"} and "trainable values" in found["left_out"]["bitfit"]
    assert all(str(BUDGET) in each["reason"] for each in trials(found, "skipped"))
    assert len(list((out / "search" / "runs").iterdir())) == 4 + 1, "one run a trial, and another seed of the best"


def test_the_start_is_tried_first_and_the_best_is_picked_by_the_tuning_split(finished):
    found, _ = finished
    first = found["trials"][0]["parameters"]
    assert first == {"method": "lora", "rank": 2, "target": "attn.q", "depth": 1.0, "learning_rate": 0.01}
    best = max(each["score"] for each in trials(found, "trained"))
    [pick] = found["confirmed"]
    assert pick["label"] == found["pick"]["label"] and pick["seeds"] == [0, 1]
    assert next(e["score"] for e in trials(found, "trained") if pick["label"].endswith(f"-{e['number']}")) == best


def test_nothing_that_is_held_out_is_trained_on_or_chosen_by(finished, rows):
    _, out = finished
    parts = {
        name: set(datasets.load_from_disk(str(out / "data" / name))["id"]) for name in ("train", "tuning", "held_out")
    }
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == len(rows)
    runs = [json.loads(path.read_text())["run"]["data"] for path in (out / "search" / "runs").glob("*/run.json")]
    assert {each["held_out"] for each in runs} == {str(out / "data" / "tuning")}
    final = [json.loads(path.read_text())["run"]["data"] for path in (out / "runs").glob("*/run.json")]
    assert {each["held_out"] for each in final} == {str(out / "data" / "held_out")}


def test_the_plan_counts_what_training_counts(finished, encoder, tmp_path):
    _, out = finished
    held = json.loads((out / "search" / "results.json").read_text())["trials"]
    what = job.Search.model_validate(
        {"model": str(encoder), "data": {"train": str(out / "data" / "train")}, "out": tmp_path, "methods": "ia3"}
    )
    planner = job.Job(what, Silent()).planner
    for each in held:
        assert planner.needs(Candidate(name=each["method"], **each["options"])).trainable == each["trainable"]


def test_train_takes_the_pick_as_it_stands(finished):
    found, out = finished
    result = CliRunner().invoke(app, ["train", str(out / "best.yaml"), "--json"])
    assert result.exit_code == 0, result.output
    first = found["report"]["trials"][0]
    assert json.loads(result.stdout)["after"] == first["after"]
    own, theirs = (path / "adapter.safetensors" for path in (out / "best" / "adapter", out / first["folder"]))
    assert own.read_bytes() == theirs.read_bytes()


@pytest.fixture
def instant(monkeypatch) -> list[str]:
    """Runs take no time; the higher the learning rate, the better. The labels of those that were asked for."""
    asked: list[str] = []

    def run_trial(comparison, candidate, seed, board):
        asked.append(candidate.called)
        score = {"accuracy": min(1.0, 5 * candidate.learning_rate)}
        costs = {"seconds_per_step": 0.1, "peak_memory": 1, "file_size": 1, "folder": ""}
        sizes = {"trainable": 100, "total": 1000, "curve": [], "losses": []}
        rate, options = candidate.learning_rate, candidate.arguments
        return Trial(
            candidate.called, candidate.name, options, seed, rate, before=score, after=score, **sizes, **costs
        ), None

    monkeypatch.setattr(job, "run_trial", run_trial)
    monkeypatch.setattr(job, "POLL", 0.01)
    return asked


@pytest.fixture
def file(encoder, csv_file, tmp_path) -> Path:
    return written(tmp_path / "search.yaml", encoder, csv_file, budget=BUDGET, trials=6, storage="study.log", out="out")


def searched(file: Path, **more: object) -> job.Job:
    return job.Job(job.Search.model_validate(job_values(file) | more), Silent())


def job_values(file: Path) -> dict:
    from peftcore.comparing.runs.reading import load

    return load(file)


@pytest.mark.parametrize("storage", ["study.log", "sqlite:///study.db"])
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


def test_a_worker_adds_to_the_study_and_leaves_the_pick_to_others(file, instant):
    result = invoke(file, "--worker", "--trials", 2)
    assert result.exit_code == 0 and "2 of 2 trials in study.log" in result.stdout
    assert not Path("out/search.json").exists()
    result = invoke(file, "--worker", "--trials", 3, "--json")
    assert json.loads(result.stdout) == {"trials": 3, "of": 3, "storage": "study.log"} and len(instant) == 3


def points(of: job.Job) -> list[dict]:
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
    first.space.suggest(lost)  # and here it is killed
    first.work()
    assert len(instant) == 5, "the sixth is still thought to be running"
    monkeypatch.setattr(studies, "GRACE", 0.0)
    first.study.bury()
    first.work()
    tried = first.study.trials()
    assert studies.LOST in tried[0].user_attrs and len(instant) == 6
    assert sum(each.params == lost.params for each in tried) == 2


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


def test_memory_is_a_limit_too(file, instant):
    free = searched(file, memory="1GB", storage="a.log")
    needs = [free.planner.needs(Candidate(name="lora", rank=rank, target="attn.q")) for rank in (1, 4)]
    assert 0 < needs[0].memory < needs[1].memory
    tight = searched(file, budget=None, memory=f"{needs[0].memory}B", storage="b.log")
    tight.work()
    assert instant and any("of memory" in each.user_attrs.get(studies.REASON, "") for each in tight.study.trials())


@pytest.mark.parametrize(
    ("text", "count"), [("50k", 50_000), ("1.5M", 1_500_000), ("2_000", 2000), (30, 30), ("0.5%", 5), ("100 %", 1000)]
)
def test_budgets(text, count):
    assert values(text, 1000) == count


@pytest.mark.parametrize(("text", "count"), [("2GB", 2 * 10**9), ("1.5 MiB", 1572864), ("10b", 10)])
def test_sizes_of_memory(text, count):
    assert memory(text) == count


@pytest.mark.parametrize("text", ["much", "-5", "5 apples", ""])
def test_no_budgets(text):
    with pytest.raises(BadInput, match="write a number"):
        values(text, 1000)
    with pytest.raises(BadInput, match="write a size"):
        memory(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("methods={}", "the space is empty"),
        ("methods={lora: {rnk: [1]}}", "lora has no option 'rnk'; did you mean 'rank'?"),
        ("methods={lora: {rank: []}}", "lora.rank: the list is empty"),
        ("methods={lora: {rank: [1, x]}}", "lora: rank='x'"),
        ("methods={lora: {depth: [1.5]}}", "lora: depth=1.5: a share of the layers"),
        ("methods={lora: {rank: {low: 8, high: 2}}}", "low must be below high"),
        ("methods={lroa: {}}", "did you mean"),
        ("budget=20", "nothing fits: the smallest candidate is lora rank=1 target=attn.q depth=0.5: 66 trainable"),
        ("budget=lots", "write a number of trainable values"),
        ("storage=nowhere/study.log", "storage=nowhere/study.log: cannot be used"),
        ("storage=texts.csv", "storage=texts.csv: cannot be used"),
        ("storage=sqlite:////nowhere/study.db", "cannot be used"),
        ("start=[{name: lora, rank: 3}]", "start: lora with rank=3 is not in the space"),
        ("quantize=nf4", "memory is not counted for packed bases"),
    ],
)
def test_bad_input_is_one_message(file, instant, change, message):
    result = invoke(file, "--set", change, *(("--memory", "1GB") if "quantize" in change else ()))
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not instant


def test_another_search_does_not_go_on_with_a_study(file, instant):
    searched(file)
    with pytest.raises(BadInput, match="of another search \\(with other budget, training\\)"):
        searched(file, budget=100, training={"steps": 3})
    searched(file, budget=100, study="another", trials=1)


def test_a_worker_wants_a_storage(encoder, csv_file):
    result = invoke("--model", encoder, "--data", csv_file, "--worker")
    assert result.exit_code == 2 and "--worker needs --storage" in result.stderr
