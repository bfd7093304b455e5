"""Lily in folders of peft, both ways; what is shared must be equal."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import CheckpointError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def host() -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(3)))


@torch.no_grad()
def stronger(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lily_B" in name:
            parameter.mul_(4)


@pytest.mark.parametrize("targets", [["up", "down"], r"\d\.(up|down)"])
def test_both_ways(targets: Any, tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 8)
    config = peft.LilyConfig(target_modules=targets, r=3, num_B=3, stride_A=2, scaling=1.5)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, stronger)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    across = "shape" if isinstance(targets, str) else "name"
    assert found == {"rank": 3, "stride": 2, "experts": 3, "scale": 1.5, "across": across}
    assert sum(name.startswith("B") for name in injection.shared) == (1 if across == "shape" else 2)
    options = {"target": ["up", "down"], "rank": 4, "stride": 3, "scale": 5.0}
    assert_writes(base, "lily", options, lambda model: model(x), tmp_path)


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    saved_by_peft(host(), peft.LilyConfig(target_modules=["up"], r=3), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.2.up.lily_B.weight"].add_(1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lily_B of 2\.up differs"):
        peftcore.load(host(), tmp_path)


def test_refusals(tmp_path: Path) -> None:
    for name, layer in {"conv": nn.Conv2d(4, 8, 3), "conv1d": Conv1D(8, 4)}.items():
        with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
            peftcore.apply(One(layer), "lily", target="layer").save(tmp_path / name, format="peft")
