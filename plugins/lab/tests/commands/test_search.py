"""``peftcore search``: what it tries, what it leaves out, what it picks by, and what it refuses."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from searches import BUDGET, written
from silent import Silent
from typer.testing import CliRunner

from peftcore.cli.commands import app
from peftcore_lab.comparisons.comparison import Candidate
from peftcore_lab.searching import search as job


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


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


@pytest.mark.slow
def test_only_what_is_within_the_budget_is_trained(finished):
    found, out = finished
    assert json.loads((out / "search.json").read_text()) == found
    assert len(trials(found, "trained")) == 4
    assert all(each["trainable"] <= BUDGET for each in trials(found, "trained"))
    assert set(found["left_out"]) == {"bitfit"} and "trainable parameters" in found["left_out"]["bitfit"]
    assert all(str(BUDGET) in each["reason"] for each in trials(found, "skipped"))
    assert len(list((out / "search" / "runs").iterdir())) == 4 + 1, "one run a trial, and another seed of the best"


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_plan_counts_what_training_counts(finished, encoder, tmp_path):
    _, out = finished
    held = json.loads((out / "search" / "results.json").read_text())["trials"]
    what = job.Search.model_validate(
        {"model": str(encoder), "data": {"train": str(out / "data" / "train")}, "out": tmp_path, "methods": "ia3"}
    )
    planner = job.SearchRun(what, Silent()).planner
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


def test_a_worker_adds_to_the_study_and_leaves_the_pick_to_others(file, instant):
    result = invoke(file, "--worker", "--trials", 2)
    assert result.exit_code == 0 and "2 of 2 trials in study.log" in result.stdout
    assert not Path("out/search.json").exists()
    result = invoke(file, "--worker", "--trials", 3, "--json")
    assert json.loads(result.stdout) == {"trials": 3, "of": 3, "storage": "study.log"} and len(instant) == 3


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
        ("budget=20", "no candidate fits: the smallest one, lora rank=1 target=attn.q depth=0.5, needs 66 trainable"),
        ("budget=lots", "write a number of trainable parameters"),
        ("storage=nowhere/study.log", "storage=nowhere/study.log: cannot be used"),
        ("storage=texts.csv", "storage=texts.csv: cannot be used"),
        ("storage=sqlite:////nowhere/study.db", "cannot be used"),
        ("start=[{name: lora, rank: 3}]", "start: lora with rank=3 is not in the space"),
        ("quantize=nf4", "memory cannot be estimated for quantized models"),
    ],
)
def test_bad_input_is_one_message(file, instant, change, message):
    result = invoke(file, "--set", change, *(("--memory", "1GB") if "quantize" in change else ()))
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not instant


def test_a_worker_wants_a_storage(encoder, csv_file):
    result = invoke("--model", encoder, "--data", csv_file, "--worker")
    assert result.exit_code == 2 and "--worker needs --storage" in result.stderr
