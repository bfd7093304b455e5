"""PEANuT in folders of peft, both ways, without layers between A and B and with some."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import CheckpointError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TARGET = ["0", "2"]


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 14), nn.Linear(14, 4))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_both_ways(depth: int, tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    config = peft.PeanutConfig(target_modules=TARGET, r=5, depth=depth, act_fn="swish", scaling=2.0)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    assert found == {"rank": 5, "depth": depth, "activation": "silu", "scale": 2.0}
    options = {"target": TARGET, "rank": 6, "depth": depth, "scale": 3.0}
    assert_writes(base, "peanut", options, lambda model: model(x), tmp_path)


def test_gradients_between_a_and_b(tmp_path: Path) -> None:
    """Of the layers there, which stand in one tensor here."""
    base, x = host(), torch.randn(2, 3, 12)
    saved_by_peft(base, peft.PeanutConfig(target_modules=TARGET, r=5, depth=2), tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path), is_trainable=True)
    mine: Any = peftcore.load(base, tmp_path, trainable=True).operators["0"]
    for model in (base, theirs):
        model(x).square().sum().backward()
    layer = theirs.base_model.model[0]
    for name, layers in (("E", layer.peanut_encoders), ("D", layer.peanut_decoders)):
        for i, each in enumerate(layers["default"]):
            assert each.weight.grad.any()
            torch.testing.assert_close(mine.get_parameter(name).grad[i], each.weight.grad)


def test_refusals(tmp_path: Path) -> None:
    for name, layer in {"conv": nn.Conv2d(4, 8, 3), "conv1d": Conv1D(8, 4)}.items():
        with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
            peftcore.apply(One(layer), "peanut", target="layer").save(tmp_path / name, format="peft")
    peft.get_peft_model(host(), peft.PeanutConfig(target_modules=TARGET, act_fn="mish")).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="act_fn = 'mish'; known are relu"):
        peftcore.load(host(), tmp_path)
