"""Several tasks in one table: ``peftcore train`` and ``compare`` with ``data.task_column``."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore_lab.data.example_sources import splits

TASKS = ("mood", "turned")
COLUMN = "data.task_column=kind"


@pytest.fixture
def table(rows: list[dict[str, str]], tmp_path: Path) -> Path:
    """Two tasks with the same texts, which have classes of their own."""
    path = tmp_path / "two.jsonl"
    other = {"good": "no", "bad": "yes"}
    lines = [{**row, "kind": "mood"} for row in rows]
    lines += [{**row, "label": other[row["label"]], "kind": "turned"} for row in rows]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def trained(*arguments: object) -> dict[str, Any]:
    result = run("train", *arguments, "--batch-size", 16, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.mark.slow
def test_a_method_is_told_the_task_of_each_row(encoder: Path, table: Path, tmp_path: Path) -> None:
    """Told the other task, the adapter gives the answers of that one; the run's scores are those of a loop by hand."""
    options = ("--model", encoder, "--task", "text-classification", "--data", table, "--set", COLUMN)
    options = (*options, "--method", "mtl_lora", "--set", "method.dropout=0.0", "--set", "method.target=all-linear")
    found = trained(*options, "--steps", 50, "--lr", "2e-2", "--out", tmp_path / "told")
    assert {*found["after"]} == {"accuracy", "loss", *(f"accuracy/{task}" for task in TASKS)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=4).eval()
    injection = peftcore.load(model, tmp_path / "told" / "adapter")
    assert injection.config.model_dump()["tasks"] == [*TASKS]
    held_out = splits(str(table), None, None).held_out
    batch = tokenizer(held_out["text"][:], padding=True, return_tensors="pt")
    truth = torch.tensor([("bad", "good", "no", "yes").index(label) for label in held_out["label"]])
    names = held_out["kind"][:]
    with torch.no_grad():
        with peftcore.call(model, task=names):
            right = model(**batch).logits.argmax(-1) == truth
        with peftcore.call(model, task=[TASKS[1 - TASKS.index(name)] for name in names]):
            other = model(**batch).logits.argmax(-1) == truth
    for task in TASKS:
        own = torch.tensor([name == task for name in names])
        assert float(right[own].float().mean()) == pytest.approx(found["after"][f"accuracy/{task}"])
    assert right.float().mean() > other.float().mean() + 0.3
    more = trained(*options[:8], "--steps", 1, "--adapter", tmp_path / "told" / "adapter", "--out", tmp_path / "on")
    assert more["before"]["accuracy"] == pytest.approx(found["after"]["accuracy"])


def test_one_task_alone(encoder: Path, table: Path, tmp_path: Path) -> None:
    options = ("--model", encoder, "--task", "text-classification", "--data", table, "--set", COLUMN)
    options = (*options, "--set", 'data.tasks=["turned"]', "--steps", 1, "--method", "lora", "--out", tmp_path / "one")
    found = trained(*options)
    assert (found["train_size"], found["held_out_size"]) != (0, 0)
    assert found["after"]["accuracy/turned"] == found["after"]["accuracy"] and "accuracy/mood" not in found["after"]


@pytest.mark.parametrize(
    ("task", "options", "reason"),
    [
        ("text-classification", ["--set", "data.task_column=sort"], "no column 'sort'"),
        ("text-classification", ["--set", COLUMN, "--set", 'data.tasks=["mod"]'], "data.tasks=mod has no row"),
        ("text-classification", ["--set", COLUMN, "--set", 'method.tasks=["mood","x"]'], "no task 'turned': mood, x"),
        ("text-classification", ["--set", COLUMN, "--set", "method.tasks=2"], "the data has: mood, turned"),
        ("causal-lm", ["--set", COLUMN, "--set", "data.pack=true"], "data.pack"),
        ("causal-lm", ["--set", COLUMN, "--set", 'data.prompts=["my phone"]'], "data.prompts"),
    ],
)
def test_what_is_refused_before_training(
    request: pytest.FixtureRequest, table: Path, task: str, options: list[str], reason: str, tmp_path: Path
) -> None:
    model = request.getfixturevalue("decoder" if task == "causal-lm" else "encoder")
    arguments = ("--model", model, "--task", task, "--data", table, "--method", "polytropon", "--out", tmp_path / "run")
    result = run("train", *arguments, "--steps", 1, *options)
    assert result.exit_code == 2 and reason in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "run" / "run.json").exists()


def test_text_is_scored_by_task(decoder: Path, table: Path, tmp_path: Path) -> None:
    options = ("--model", decoder, "--task", "causal-lm", "--data", table, "--set", COLUMN, "--steps", 1)
    found = trained(*options, "--method", "hyperformer_pp", "--out", tmp_path / "run")
    assert {f"perplexity/{task}" for task in TASKS} < {*found["after"]}


@pytest.mark.slow
def test_a_comparison_has_scores_by_task(encoder: Path, table: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    arguments = ("--model", encoder, "--data", table, "--methods", "lora,polytropon", "--set", COLUMN)
    result = run("compare", *arguments, "--out", tmp_path / "out", "--steps", 2, "--set", "together=4")
    assert result.exit_code == 0, result.output
    assert all(task in result.stdout for task in TASKS)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    for row, trial in zip(rows, report["trials"], strict=True):
        for task in TASKS:
            assert float(row[f"accuracy/{task}_mean"]) == trial["after"][f"accuracy/{task}"]
    head = (tmp_path / "out" / "results.md").read_text().splitlines()[0]
    assert head.endswith("| accuracy | mood | turned |")
    assert all(f">{task}" in (tmp_path / "out" / "report.html").read_text() for task in TASKS)
