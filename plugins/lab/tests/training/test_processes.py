"""Weights cut over two processes (FSDP2 on gloo): what one process learns on the same global batch, saved whole."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sharded_runs
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from silent import Silent

from peftcore_lab.runs.run import Run
from peftcore_lab.training import train as job

METHODS = {
    "lora": {"rank": 4},  # beside weights
    "dora": {"rank": 4},  # reads them
    "qlora": {"rank": 4},  # packs them
    "bitfit": {},  # trains the host's own
    "adalora": {"rank": 4, "target_rank": 2},  # has a loss, and changes ranks from gradients of all sites
    "galore": {"rank": 2},  # projects gradients
}


def run_of(model: Path, data: Path, method: str, processes: int, autocast: bool = False) -> dict[str, object]:
    return {
        "model": str(model),
        "task": "text-classification",
        "data": {"train": str(data)},
        "method": {"name": method, **METHODS[method]},
        "training": {
            "steps": 6,
            "batch_size": 16 // processes,
            "evaluate_every": 3,
            "learning_rate": 1e-2,
            "shard": True,
            "autocast": autocast,
        },
        "out": f"{processes}/{method}{'-rounded' if autocast else ''}",
    }


def written(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    file = Path(folder) / "adapter.safetensors"
    with safe_open(file, "pt") as opened:
        return load_file(file), opened.metadata()


@pytest.mark.slow
def test_in_pieces_a_model_learns_what_it_does_whole(still: Path, csv_file: Path, tmp_path: Path) -> None:
    """One launch for all methods: the two processes take fifteen seconds, most of it to import what they need."""
    runs = [run_of(still, csv_file, method, 2) for method in METHODS]
    runs.append(run_of(still, csv_file, "dora", 2, autocast=True))
    (tmp_path / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, sharded_runs.__file__, "runs.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for method in METHODS:
        one = job.train(Run.model_validate(run_of(still, csv_file, method, 1)), Silent())
        two = json.loads(Path(f"2/{method}-whole/metrics.json").read_text(encoding="utf-8"))
        assert np.allclose(two["losses"], one.losses, rtol=1e-5), method
        assert (two["trainable"], two["total"]) == (one.trainable, one.total)

        alone, about = written(f"1/{method}/adapter")
        for folder in (f"2/{method}-whole/adapter", f"2/{method}-whole/again"):
            together, said = written(folder)
            assert said == about
            assert together.keys() == alone.keys()
            for key, value in alone.items():  # Adam makes something of gradients that are nothing but rounding
                torch.testing.assert_close(together[key], value, rtol=1e-5, atol=1e-4, msg=f"{method}: {key}")

        resumed = json.loads(Path(f"2/{method}/metrics.json").read_text(encoding="utf-8"))
        assert resumed["losses"] == two["losses"], method
        last, again = (
            load_file(f"2/{name}/checkpoints/checkpoint-6/model.safetensors") for name in (f"{method}-whole", method)
        )
        assert last.keys() == again.keys()
        assert all(torch.equal(last[key], again[key]) for key in last), method

    one = job.train(Run.model_validate(run_of(still, csv_file, "dora", 1, autocast=True)), Silent())
    two = json.loads(Path("2/dora-rounded-whole/metrics.json").read_text(encoding="utf-8"))
    assert np.allclose(two["losses"], one.losses, rtol=5e-3)  # in bfloat16, of which each way rounds in other places
    assert {value.dtype for value in written("2/dora-rounded-whole/adapter")[0].values()} == {torch.float32}
