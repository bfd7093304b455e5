"""``peftcore train`` in two processes (gloo): what one process gives on the same global batch, written once."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import command_lines
import numpy as np
import psutil
import pytest
import torch
import yaml
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


def learned_the_same(said: str, one: dict[str, Any], out: str = "two", of_one: str = "one", atol: float = 1e-6) -> None:
    two = json.loads(said)  # one of them speaks
    assert np.allclose(two["losses"], one["losses"], rtol=max(1e-5, atol))
    assert two["after"]["accuracy"] == one["after"]["accuracy"]  # mean losses of scores count what fills up batches
    alone, together = (load_file(f"{folder}/adapter/adapter.safetensors") for folder in (of_one, out))
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-5, atol=atol)


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


METHODS: dict[str, dict[str, Any]] = {
    "dora": {"rank": 4},
    "oft": {},
    "prefix_tuning": {"projection": None},
    "houlsby_adapter": {},
    "bitfit": {
        "exclude": "*.key"
    },  # trains the model's own; biases of keys change nothing but rounding, as which Adam moves them
    "adalora": {"rank": 4, "target_rank": 2},  # follows a schedule
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_methods_of_every_kind_learn_in_two_processes_what_they_do_in_one(config: Path, launcher: list[str]) -> None:
    lines = {}
    for name, options in METHODS.items():
        file = Path(f"{name}.yaml")
        file.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "method": {"name": name, **options}}))
        lines[name] = ["train", str(file), "--json", "--out"]
    Path("lines.json").write_text(json.dumps([[*line, f"two/{name}"] for name, line in lines.items()]), "utf-8")
    said, end = launched(*launcher, command_lines.__file__, "lines.json"), 0
    for name, line in lines.items():
        two, end = json.JSONDecoder().raw_decode(said, end + said[end:].index("{"))
        alone = CliRunner().invoke(app, [*line, f"one/{name}", "--batch-size", "16"])
        assert alone.exit_code == 0, alone.output
        learned_the_same(json.dumps(two), json.loads(alone.stdout), f"two/{name}", f"one/{name}")


def first_checkpoint(out: str) -> Path:
    found = Path(out).glob("checkpoints/checkpoint-*/complete")
    return min((each.parent for each in found), key=lambda each: int(each.name.rpartition("-")[2]))


def cut_off(out: str, kept: str) -> None:
    """Leave of a run in another folder what it had after its first checkpoint."""
    first = first_checkpoint(out)
    shutil.copytree(first, Path(kept) / "checkpoints" / first.name)
    shutil.copy(Path(out) / "run.json", kept)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(config: Path, one: dict[str, Any]) -> None:
    cut_off("one", "rest")
    line = ["train", str(config), "--out", "rest", "--resume", "--json"]
    learned_the_same(launched(*TORCHRUN, "-m", "peftcore", *line), one, "rest")


def children(pid: int) -> list[psutil.Process]:
    """The two processes, when they are there."""
    until = time.monotonic() + 120
    while len(found := psutil.Process(pid).children()) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_of_two_processes_one_is_killed_and_one_alone_goes_on(config: Path) -> None:
    line = ["train", str(config), "--steps", "240", "--set", "training.checkpoints=last"]
    line += ["--set", "training.evaluate_every=20"]
    alone = CliRunner().invoke(app, [*line, "--out", "one", "--batch-size", "16", "--json"])
    assert alone.exit_code == 0, alone.output
    running = subprocess.Popen(
        [sys.executable, "-m", *TORCHRUN, "-m", "peftcore", *line, "--out", "two"], stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 240
    *_, last = children(running.pid)
    while not any(Path("two").glob("checkpoints/checkpoint-*/complete")) and running.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    last.kill()
    assert running.wait() != 0 and not Path("two/adapter").exists()

    line += ["--out", "two", "--resume", "--json"]
    refused = CliRunner().invoke(app, line)
    assert refused.exit_code != 0 and "a run of 16 examples a step in 2 process(es)" in refused.output
    done = CliRunner().invoke(app, [*line, "--batch-size", "16"])
    assert done.exit_code == 0, done.output
    learned_the_same(done.stdout, json.loads(alone.stdout), atol=1e-4)  # after 240 steps of rounding
    assert json.loads(done.stdout)["steps"] == 240
