"""One training in two processes that Ray Train starts: what one process learns on the same batches, also where one of
the two is killed on the way."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_this_machine import Kills
from safetensors.torch import load_file
from silent import Silent

from peftcore.errors import BadInput
from peftcore.testing.kit import ALL
from peftcore_lab.runs.run import Run
from peftcore_lab.training.cluster import Cluster
from peftcore_lab.training.train import train

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


def run_of(model: Path, data: Path, out: Path, method: dict[str, Any], processes: int, steps: int = 6) -> Run:
    training = {
        "steps": steps,
        "batch_size": 8 // processes,
        "evaluate_every": min(steps // 2, 100),
        "checkpoints": "last",
    }
    return Run.model_validate(
        {
            "model": str(model),
            "task": "text-classification",
            "data": {"train": str(data)},
            "method": method,
            "training": training,
            "out": out / str(processes),
        }
    )


def assert_same(run: Run, alone: Run) -> None:
    one, two = (load_file(each.out / "adapter" / "adapter.safetensors") for each in (alone, run))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6, msg=key)


METHODS = {
    "lora": {},
    "dora": {},
    "oft": {},
    "prefix_tuning": {"projection": None},
    "houlsby_adapter": {},
    "bitfit": {"exclude": "*.key"},  # whose biases change nothing but rounding, as which Adam moves them
    "adalora": {"rank": 4, "target_rank": 2},
}


@pytest.mark.parametrize("method", METHODS if os.environ.get(ALL) == "1" else ["houlsby_adapter"])
def test_two_processes_learn_what_one_does(still: Path, csv_file: Path, tmp_path: Path, method: str) -> None:
    run, alone = (run_of(still, csv_file, tmp_path, {"name": method, **METHODS[method]}, count) for count in (2, 1))
    two, one = Cluster().train(run, 2), train(alone, Silent())
    assert np.allclose(two.losses, one.losses, rtol=1e-5)
    assert (two.trainable, two.steps, two.saved) == (one.trainable, 6, str(run.out / "adapter"))
    assert_same(run, alone)
    other = run.model_copy(update={"training": run.training.model_copy(update={"learning_rate": 3e-3})})
    for each in (run, other):
        with pytest.raises(BadInput, match="holds a run already"):
            Cluster().train(each, 2)


def test_a_process_that_is_killed_costs_what_came_after_the_checkpoint(
    still: Path, csv_file: Path, tmp_path: Path
) -> None:
    run, alone = (run_of(still, csv_file, tmp_path, {"name": "bitfit"}, count, 300) for count in (2, 1))
    watch = Kills(run.out, "", "ray::RayTrainWorker")
    watch.start()
    two, one = Cluster().train(run, 2), train(alone, Silent())
    watch.assert_went_on()
    assert np.allclose(two.losses, one.losses, rtol=1e-3)  # after 300 steps of rounding


@pytest.mark.skipif(os.environ.get(ALL) != "1", reason="a minute, in which Ray Train begins four times")
def test_what_is_wrong_is_said(still: Path, csv_file: Path, tmp_path: Path) -> None:
    run = run_of(still, csv_file, tmp_path, {"name": "lora"}, 2)
    with pytest.raises(BadInput, match="no column"):
        Cluster().train(run.model_copy(update={"data": {**run.data, "text": "nothing"}}), 2)
