"""``peftcore compare`` on a user's own model and data: what it writes, and that every method had the same chances."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore.errors import TrainingError
from peftcore_lab.data.example_sources import splits
from peftcore_lab.reports.trials import ComparisonReport, Trial
from peftcore_lab.training.train import train

METHODS = "linear_probe,bitfit,ln_tuning,ia3,lora,dora,houlsby_adapter,full"
MEASURED = ("seconds", "seconds_per_step", "peak_memory")
EACH_STEP = ("--set", "training.evaluate_every=1")


def compare(model: Path, data: Path, out: Path, *options: str, methods: str = METHODS) -> dict:
    arguments = ["compare", "--model", str(model), "--data", str(data), "--methods", methods, "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--steps", "6", "--batch-size", "8", "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory, rows) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("compare")
    data = folder / "texts.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    torch.set_num_threads(1)
    return compare(encoder, data, folder / "out", "--set", "data.held_out_size=40", *EACH_STEP), folder


@pytest.mark.slow
def test_writes_what_it_prints(finished):
    report, folder = finished
    assert json.loads((folder / "out" / "results.json").read_text()) == report


def test_reports_every_method_in_order_with_everything_measured(finished):
    report, _ = finished
    assert [trial["method"] for trial in report["trials"]] == METHODS.split(",")
    assert (report["train_size"], report["held_out_size"]) == (80, 40)
    assert 0.4 <= report["floor"] <= 0.6
    for trial in report["trials"]:
        assert 0 <= trial["before"]["accuracy"] <= 1 and 0 <= trial["after"]["accuracy"] <= 1
        assert trial["share"] == trial["trainable"] / trial["total"]
        assert trial["seconds_per_step"] > 0 and trial["peak_memory"] > 0
        assert [step for step, _ in trial["losses"]] == [1, 2, 3, 4, 5, 6]
        assert trial["curve"][0] == [0, trial["before"]["accuracy"]]
        assert trial["curve"][-1] == [6, trial["after"]["accuracy"]]


def test_all_start_from_the_same_head_and_the_reference_trains_everything(finished):
    trials = {trial["method"]: trial for trial in finished[0]["trials"]}
    assert len({trial["before"]["accuracy"] for trial in trials.values()}) == 1
    first = {trial["losses"][0][1] for trial in trials.values()}
    assert max(first) - min(first) < 1e-3, "the first batch, before any update, differs between methods"
    assert trials["full"]["share"] == 1
    assert trials["linear_probe"]["trainable"] == 16 * 2 + 2
    assert all(trial["trainable"] > 34 for name, trial in trials.items() if name != "linear_probe")


def test_the_picture_is_a_png_and_the_page_has_a_row_for_every_method(finished):
    folder = finished[1]
    assert (folder / "out" / "results.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert [name for name in METHODS.split(",") if f">{name}<" not in page] == []


def test_saved_adapters_load_into_a_fresh_model_and_score_the_same(finished, encoder):
    report, folder = finished
    found = splits(str(folder / "texts.jsonl"), None, 40).held_out
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    batch = tokenizer(found["text"][:], padding=True, return_tensors="pt")
    truth = torch.tensor([("bad", "good").index(label) for label in found["label"]])
    auto = transformers.AutoModelForSequenceClassification
    for trial in report["trials"]:
        saved = folder / "out" / trial["folder"]
        assert trial["file_size"] == sum(file.stat().st_size for file in saved.iterdir())
        full = trial["method"] == "full"
        model = auto.from_pretrained(saved if full else encoder, num_labels=2)
        if not full:
            peftcore.load(model, saved)
        with torch.no_grad():
            accuracy = (model.eval()(**batch).logits.argmax(-1) == truth).float().mean()
        assert float(accuracy) == pytest.approx(trial["after"]["accuracy"]), trial["method"]


@pytest.fixture
def undrawn(monkeypatch):
    """For what says nothing of the picture and the page: to draw them takes longer than to train."""
    monkeypatch.setattr("peftcore_lab.reports.report_files.page", lambda report, folder: "")
    monkeypatch.setattr("peftcore_lab.reports.report_files.draw_picture", lambda report, path: None)


def timeless(report: dict) -> dict:
    trials = [{k: v for k, v in trial.items() if k not in MEASURED} for trial in report["trials"]]
    return {**{k: v for k, v in report.items() if k not in MEASURED}, "trials": trials}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_flags_give_methods_the_chances_that_a_file_gives_them(encoder, csv_file, tmp_path):
    """And all of them the same: what suits each on the demonstration's tweets stays there."""
    named = compare(encoder, csv_file, tmp_path / "flags", methods="lora,pissa,bitfit,full")
    assert {(trial["learning_rate"], *trial["options"]) for trial in named["trials"]} == {(1e-3,)}
    path = tmp_path / "comparison.yaml"
    path.write_text(
        f"model: {encoder}\ndata: {{train: {csv_file}}}\nmethods: lora,pissa,bitfit,full\n"
        "training: {steps: 6, batch_size: 8}\n",
        encoding="utf-8",
    )
    result = CliRunner().invoke(app, ["compare", str(path), "--json", "--out", str(tmp_path / "file")])
    assert result.exit_code == 0, result.output
    assert timeless(json.loads(result.stdout)) == timeless(named)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_seed_decides_everything(encoder, csv_file, tmp_path):
    first, second, other = (
        compare(encoder, csv_file, tmp_path / name, "--seeds", seed, methods="lora,full")
        for name, seed in (("a", "3"), ("b", "3"), ("c", "4"))
    )
    assert timeless(first) == timeless(second)
    assert first["trials"][0]["losses"] != other["trials"][0]["losses"]
    adapter = "runs/lora/adapter/adapter.safetensors"
    assert (tmp_path / "a" / adapter).read_bytes() == (tmp_path / "b" / adapter).read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_a_method_does_not_depend_on_those_before_it(encoder, csv_file, tmp_path):
    together = compare(encoder, csv_file, tmp_path / "a", methods="bitfit,lora")
    alone = compare(encoder, csv_file, tmp_path / "b", methods="lora")
    assert timeless(together)["trials"][1] == timeless(alone)["trials"][0]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_learns_what_there_is_to_learn(encoder, csv_file, tmp_path):
    options = ("--steps", "120", "--batch-size", "16", "--lr", "0.01", "--set", "training.evaluate_every=40")
    lora, full = compare(encoder, csv_file, tmp_path / "out", *options, methods="lora,full")["trials"]
    assert (lora["learning_rate"], full["learning_rate"]) == (0.01, 0.01)
    assert lora["losses"][-1][1] < 0.95 * lora["losses"][0][1]
    assert full["after"]["accuracy"] > 0.9


@pytest.mark.slow
def test_seeds_and_configurations_of_one_method(encoder, csv_file, tmp_path):
    """From a file; the mean over seeds and its standard error."""
    path = tmp_path / "comparison.yaml"
    path.write_text(
        f"model: {encoder}\ndata: {{train: {csv_file}}}\nseeds: [0, 1, 2]\ntraining: {{steps: 4, batch_size: 8}}\n"
        "methods: [lora, {name: lora, label: large, rank: 16, learning_rate: 1e-2}]\n",
        encoding="utf-8",
    )
    result = CliRunner().invoke(app, ["compare", str(path), "--json", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    trials = json.loads(result.stdout)["trials"]
    assert [(trial["label"], trial["seed"]) for trial in trials] == [
        (n, s) for n in ("lora", "large") for s in range(3)
    ]
    assert trials[3]["options"] == {"rank": 16} and trials[3]["learning_rate"] == 1e-2
    facts = {key: value for key, value in json.loads(result.stdout).items() if key != "versions"}
    facts["trials"] = tuple(Trial(**{k: v for k, v in trial.items() if k != "share"}) for trial in trials)
    report = ComparisonReport(**facts)
    small, large = report.entries()
    scores = [trial["after"]["accuracy"] for trial in trials[:3]]
    assert small.score == pytest.approx(np.mean(scores))
    assert small.error == pytest.approx(np.std(scores, ddof=1) / 3**0.5)
    assert large.trainable > small.trainable


def test_a_method_that_fails_on_the_way_is_reported_and_the_others_go_on(encoder, csv_file, tmp_path, monkeypatch):
    def broken(run, board, resume):
        if run.method.name == "bitfit":
            raise TrainingError("the loss became nan")
        return train(run, board, resume)

    monkeypatch.setattr("peftcore_lab.comparisons.running.train", broken)
    report = compare(encoder, csv_file, tmp_path / "out", methods="bitfit,lora")
    assert report["failed"] == {"bitfit": "the loss became nan"}
    assert [trial["method"] for trial in report["trials"]] == ["lora"]


@pytest.mark.usefixtures("undrawn")
def test_columns_can_be_named(encoder, jsonl_file, tmp_path):
    report = compare(encoder, jsonl_file, tmp_path / "out", "--set", "data.label=stars", methods="lora")
    assert report["trials"]


@pytest.mark.usefixtures("undrawn")
def test_a_pooler_that_is_new_belongs_to_the_head(poolerless, csv_file, tmp_path):
    [trial] = compare(poolerless, csv_file, tmp_path / "out", methods="linear_probe")["trials"]
    assert trial["trainable"] == (16 * 2 + 2) + (16 * 16 + 16)


@pytest.mark.usefixtures("undrawn")
def test_a_decoder_without_padding_token(decoder, csv_file, tmp_path):
    lora, full = compare(decoder, csv_file, tmp_path / "out", methods="lora,full")["trials"]
    assert lora["before"] == full["before"]
    assert full["share"] == 1


@pytest.mark.usefixtures("undrawn")
def test_the_table_fits_a_terminal_of_80_columns(encoder, csv_file, tmp_path):
    arguments = ["compare", "--model", str(encoder), "--data", str(csv_file), "--methods", "lora,full"]
    result = CliRunner().invoke(
        app, [*arguments, "--steps", "2", "--out", str(tmp_path / "out")], env={"COLUMNS": "80", "TERM": "dumb"}
    )
    assert result.exit_code == 0, result.output
    assert "lora" in result.stdout and "100.00%" in result.stdout and "Majority baseline" in result.stdout
    assert "lora: attn.q attn.v cross.q cross.v, learning rate 0.001" in result.stdout
    assert "full: all parameters, learning rate 0.001" in result.stdout
    assert "…" not in result.stdout, "a cell was cut"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_rates_are_chosen_by_examples_that_the_report_does_not_use(encoder, csv_file, tmp_path):
    """All methods get the same rates, and the best of each is that of a comparison by hand."""
    out, grid = tmp_path / "out", (1e-6, 1e-2, 3e-2)
    options = ("--tune-lr", "1e-6,1e-2,3e-2", "--seeds", "1,2", "--set", "tuning_size=30", *EACH_STEP)
    report = compare(encoder, csv_file, out, *options, methods="lora,bitfit")
    parts = {name: splits(str(out / "data" / name), None, 1).train for name in ("train", "tuning", "held_out")}
    texts = {name: set(part["text"]) for name, part in parts.items()}
    tried = json.loads((out / "tuning" / "results.json").read_text(encoding="utf-8"))
    assert [trial["learning_rate"] for trial in tried["trials"]] == [*grid, *grid]
    assert {trial["seed"] for trial in tried["trials"]} == {1} and tried["held_out_size"] == 30
    assert tried["train_size"] == report["train_size"] and len(texts) == 3
    for method in ("lora", "bitfit"):
        scores = {t["learning_rate"]: t["after"]["accuracy"] for t in tried["trials"] if t["method"] == method}
        best = next(rate for rate in grid if scores[rate] == max(scores.values()))
        mine = [trial for trial in report["trials"] if trial["method"] == method]
        assert [(trial["seed"], trial["learning_rate"]) for trial in mine] == [(1, best), (2, best)]
    assert report["tuned"].startswith("Learning rates were chosen from 1e-06, 0.01, 0.03 on 30 tuning examples.")
    assert {path.name for path in out.iterdir()} >= {"results.csv", "results.md", "results.tex"}


def test_rates_are_given_or_tuned(encoder, csv_file, tmp_path):
    given = ["compare", "--model", str(encoder), "--data", str(csv_file), "--tune-lr", "1e-3"]
    for flags, words in (
        (["--methods", "lora", "--lr", "1e-3"], "use only one of them"),
        (["--methods", "lora", "--tune-lr", "0"], "tune_lr"),
    ):
        result = CliRunner().invoke(app, [*given, *flags])
        assert result.exit_code == 2 and words in result.stderr, result.stderr
    config = tmp_path / "compare.yaml"
    config.write_text("methods: [{name: lora, learning_rate: 1e-3}]\n", encoding="utf-8")
    result = CliRunner().invoke(app, [given[0], str(config), *given[1:]])
    assert result.exit_code == 2 and "lora sets its own learning_rate" in result.stderr


@pytest.mark.usefixtures("undrawn")
def test_options_are_flags_of_the_methods_that_have_them(encoder, csv_file, tmp_path):
    report = compare(encoder, csv_file, tmp_path / "out", "--rank", "3", methods="lora,bitfit,full")
    assert [trial["options"] for trial in report["trials"]] == [{"rank": 3}, {}, {}]
