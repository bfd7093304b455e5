"""``peftcore train`` in two processes (gloo): what one process gives on the same global batch, written once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import command_lines
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from peftcore.cli.commands import app

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]


@pytest.fixture
def config(encoder: Path, csv_file: Path, tmp_path: Path) -> Path:
    """Without dropout, of which each process draws its own."""
    described = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = tmp_path / "still"
    folder.mkdir()
    for file in encoder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps({**described, **still}), encoding="utf-8")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {folder}\ntask: text-classification\ndata: {{train: {csv_file}}}\nmethod: {{name: lora, rank: 4}}\n"
        "training: {steps: 6, batch_size: 8, evaluate_every: 3, learning_rate: 1e-2}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def one(config: Path) -> dict[str, Any]:
    """What one process says."""
    result = CliRunner().invoke(app, ["train", str(config), "--out", "one", "--batch-size", "16", "--json"])
    assert result.exit_code == 0, result.output
    said: dict[str, Any] = json.loads(result.stdout)
    return said


def launched(*line: str) -> str:
    """What two processes print."""
    return subprocess.run([sys.executable, "-m", *line], check=True, capture_output=True, text=True).stdout


def learned_the_same(said: str, one: dict[str, Any], out: str = "two") -> None:
    two = json.loads(said)  # one of them speaks
    assert np.allclose(two["losses"], one["losses"], rtol=1e-5)
    assert two["after"]["accuracy"] == one["after"]["accuracy"]  # mean losses of scores count what fills up batches
    alone, together = (load_file(f"{folder}/adapter/adapter.safetensors") for folder in ("one", out))
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_of_accelerate_learn_what_one_does(config: Path, one: dict[str, Any]) -> None:
    learned_the_same(
        launched(*ACCELERATE, "-m", "peftcore", "train", str(config), "--out", "two", "--json"), one, "two"
    )


@pytest.mark.slow
def test_two_processes_of_torchrun_learn_what_one_does(config: Path, one: dict[str, Any]) -> None:
    """With a whole model each, and with one in pieces."""
    runs = {"two": [], "pieces": ["--set", "training.shard=true"]}
    lines = [["train", str(config), "--out", out, "--json", *more] for out, more in runs.items()]
    Path("lines.json").write_text(json.dumps(lines), encoding="utf-8")
    said = launched(*TORCHRUN, command_lines.__file__, "lines.json")
    whole, end = json.JSONDecoder().raw_decode(said)
    learned_the_same(json.dumps(whole), one)
    learned_the_same(said[end:], one, "pieces")
