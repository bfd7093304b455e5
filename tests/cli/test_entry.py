"""What a terminal gets from the entry point: what a command says, and nothing that libraries say while they are
imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LINES = """
import json
import sys

from peftcore.cli.entry import main

for line in json.loads(sys.argv[1]):
    sys.argv = ["peftcore", *line]
    try:
        main()
    except SystemExit as end:
        assert not end.code, f"{line} ends with {end.code}"
"""


def said(*lines: list[str]) -> tuple[str, str]:
    """Both streams of a process of its own that runs these command lines one after the other."""
    ran = subprocess.run([sys.executable, "-c", LINES, json.dumps(lines)], capture_output=True, text=True, check=False)
    assert not ran.returncode, ran.stderr
    return ran.stdout, ran.stderr


@pytest.mark.slow
def test_commands_that_look_say_nothing_on_stderr(encoder: Path) -> None:
    model = str(encoder)
    looking = [["methods"], ["show", "lora"], ["doctor"], ["plan", model, "lora"], ["tree", model, "lora"]]
    out, err = said(*looking, ["schema", "lora"], ["train", "--help"])
    assert err == ""
    assert "All is well." in out


@pytest.mark.slow
def test_a_run_says_its_steps_alone_on_stderr(encoder: Path, csv_file: Path) -> None:
    """It imports transformers' Trainer and accelerate, which import torchao and bitsandbytes where these are
    installed."""
    run = ["train", "--model", str(encoder), "--data", str(csv_file), "--task", "text-classification", "--steps", "2"]
    out, err = said([*run, "--method", "lora", "--out", "run", "--set", "quantize=nf4"])
    assert [line for line in err.splitlines() if line.strip() and not line.startswith("step ")] == []
    assert "saved in run" in out
