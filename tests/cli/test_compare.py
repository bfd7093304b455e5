"""``peftcore compare`` on a user's own model and data: what it writes, and that every method had the same chances."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore.cli.data import read_task
from peftcore.cli.models import load_model, load_tokenizer

METHODS = "linear_probe,bitfit,ln_tuning,ia3,lora,dora,houlsby_adapter,full"
MEASURED = ("seconds", "seconds_per_step", "peak_memory")


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
    return compare(encoder, data, folder / "out", "--eval-size", "40"), folder


def test_writes_what_it_prints(finished):
    report, folder = finished
    assert json.loads((folder / "out" / "results.json").read_text()) == report


def test_reports_every_method_in_order_with_everything_measured(finished):
    report, _ = finished
    assert [result["method"] for result in report["results"]] == METHODS.split(",")
    assert report["labels"] == ["bad", "good"]
    assert (report["train_size"], report["held_out_size"]) == (80, 40)
    assert 0.4 <= report["majority"] <= 0.6
    for result in report["results"]:
        assert 0 <= result["accuracy_before"] <= 1 and 0 <= result["accuracy_after"] <= 1
        assert result["share"] == result["trainable"] / result["total"]
        assert result["seconds_per_step"] > 0 and result["peak_memory"] > 0
        assert len(result["losses"]) == 6


def test_all_start_from_the_same_head_and_the_reference_trains_everything(finished):
    results = {result["method"]: result for result in finished[0]["results"]}
    assert len({result["accuracy_before"] for result in results.values()}) == 1
    first = {result["losses"][0] for result in results.values()}
    assert max(first) - min(first) < 1e-3, "the first batch, before any update, differs between methods"
    assert results["full"]["share"] == 1
    assert results["linear_probe"]["trainable"] == 16 * 2 + 2
    assert all(result["trainable"] > 34 for name, result in results.items() if name != "linear_probe")


def test_the_picture_is_a_png(finished):
    assert (finished[1] / "out" / "results.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_saved_adapters_load_into_a_fresh_model_and_score_the_same(finished, encoder):
    report, folder = finished
    task = read_task(folder / "texts.jsonl", None, None, 40)
    tokenizer = load_tokenizer(encoder)
    batch = tokenizer([example.text for example in task.held_out], padding=True, return_tensors="pt")
    truth = torch.tensor([task.labels.index(example.label) for example in task.held_out])
    for result in report["results"]:
        saved = folder / "out" / result["folder"]
        assert result["file_size"] == sum(file.stat().st_size for file in saved.iterdir())
        full = result["method"] == "full"
        model, _ = load_model(saved if full else encoder, task.labels, tokenizer, seed=99)
        if not full:
            peftcore.load(model, saved)
        with torch.no_grad():
            accuracy = (model.eval()(**batch).logits.argmax(-1) == truth).float().mean()
        assert float(accuracy) == pytest.approx(result["accuracy_after"]), result["method"]


def timeless(report: dict) -> dict:
    results = [{k: v for k, v in result.items() if k not in MEASURED} for result in report["results"]]
    return {**{k: v for k, v in report.items() if k not in MEASURED}, "results": results}


def test_a_seed_decides_everything(encoder, csv_file, tmp_path):
    first, second, other = (
        compare(encoder, csv_file, tmp_path / name, "--seed", seed, methods="lora,full")
        for name, seed in (("a", "3"), ("b", "3"), ("c", "4"))
    )
    assert timeless(first) == timeless(second)
    assert first["results"][0]["losses"] != other["results"][0]["losses"]
    adapter = "adapters/lora/adapter.safetensors"
    assert (tmp_path / "a" / adapter).read_bytes() == (tmp_path / "b" / adapter).read_bytes()


def test_a_method_does_not_depend_on_those_before_it(encoder, csv_file, tmp_path):
    together = compare(encoder, csv_file, tmp_path / "a", methods="bitfit,lora")
    alone = compare(encoder, csv_file, tmp_path / "b", methods="lora")
    assert timeless(together)["results"][1] == timeless(alone)["results"][0]


def test_learns_what_there_is_to_learn(encoder, csv_file, tmp_path):
    options = ("--steps", "60", "--batch-size", "16", "--lr", "0.01")
    lora, full = compare(encoder, csv_file, tmp_path / "out", *options, methods="lora,full")["results"]
    assert (lora["learning_rate"], full["learning_rate"]) == (0.01, 0.01)
    assert lora["losses"][-1] < 0.9 * lora["losses"][0]
    assert full["accuracy_after"] > 0.9


def test_columns_can_be_named(encoder, jsonl_file, tmp_path):
    report = compare(encoder, jsonl_file, tmp_path / "out", "--label-column", "stars", methods="lora")
    assert report["labels"] == ["0", "1"]


def test_a_pooler_that_is_new_belongs_to_the_head(poolerless, csv_file, tmp_path):
    [result] = compare(poolerless, csv_file, tmp_path / "out", methods="linear_probe")["results"]
    assert result["trainable"] == (16 * 2 + 2) + (16 * 16 + 16)


def test_a_decoder_without_padding_token(decoder, csv_file, tmp_path):
    lora, full = compare(decoder, csv_file, tmp_path / "out", methods="lora,full")["results"]
    assert lora["accuracy_before"] == full["accuracy_before"]
    assert full["share"] == 1


def test_the_table_fits_a_terminal_of_80_columns(encoder, csv_file, tmp_path):
    arguments = ["compare", "--model", str(encoder), "--data", str(csv_file), "--methods", "lora,full"]
    result = CliRunner().invoke(
        app, [*arguments, "--steps", "2", "--out", str(tmp_path / "out")], env={"COLUMNS": "80", "TERM": "dumb"}
    )
    assert result.exit_code == 0, result.output
    assert "lora" in result.stdout and "100.00%" in result.stdout and "Majority class" in result.stdout
    assert "…" not in result.stdout, "a cell was cut"
