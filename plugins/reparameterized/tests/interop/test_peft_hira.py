"""HiRA in folders of peft, both ways."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(12, 7), (2, 3, 12)),
    "transposed": (lambda: Conv1D(7, 12), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2), (2, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 4, 5)),
    "table": (lambda: nn.Embedding(9, 5), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_both_ways(name: str, tmp_path: Path) -> None:
    build, shape = LAYERS[name]
    base, x = One(build()), torch.randn(shape) if shape else torch.randint(9, (4, 9))
    config = peft.HiraConfig(target_modules=["layer"], r=3, init_weights=name == "table")
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert injection.config.rank == 3
    assert_writes(base, "hira", {"target": "layer", "rank": 3}, lambda model: model(x), tmp_path)


def test_the_rank_is_that_of_the_tensors(tmp_path: Path) -> None:
    """peft passes over its own `rank_pattern`."""
    base, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(4, 6)
    config = peft.HiraConfig(target_modules=["0", "2"], r=3, rank_pattern={"2": 2})
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert {injection.config.at(path).rank for path in ("0", "2")} == {3}


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    layers = {
        "groups": nn.Conv2d(4, 6, 3, groups=2),
        "padding_mode='reflect'": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        "max_norm": nn.Embedding(9, 4, max_norm=1.0),
    }
    for reason, layer in layers.items():
        injection = peftcore.apply(One(layer), "hira", target="layer", rank=2)
        with pytest.raises(ExportError, match=f"peft computes something else with {reason}"):
            injection.save(tmp_path / "refused", format="peft")
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    injection = peftcore.apply(base, "hira", target=["0", "1"], rank=2, overrides={"1": {"rank": 4}})
    with pytest.raises(ExportError, match="one r for all modules"):
        injection.save(tmp_path / "ranks", format="peft")
