"""C3A in folders of peft, both ways."""

from pathlib import Path

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes
from torch import nn

import peftcore
from peftcore.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TARGET = ["0", "2"]


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 16))


def larger(model: nn.Module) -> None:
    """A part of the kernels is added, as small as the model is wide."""
    for name, value in model.named_parameters():
        if "c3a" in name:
            value.data.mul_(20)


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_both_ways(start: bool | str, tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    config = peft.C3AConfig(target_modules=TARGET, block_size=4, init_weights=start, bias="c3a_only")
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, larger)
    assert injection.config.block_size == 4
    options = {"target": TARGET, "block_size": 2, "start": "gaussian", "train": ["0.bias", "2.bias"]}
    written = assert_writes(base, "c3a", options, lambda model: model(x), tmp_path)
    assert (written["block_size"], written["bias"]) == (2, "c3a_only")


def test_widths_by_pattern(tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    config = peft.C3AConfig(target_modules=TARGET, block_size=4, block_size_pattern={"2": 8}, init_weights="gaussian")
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, larger)
    assert {path: operator.w.shape[-1] for path, operator in injection.operators.items()} == {"0": 4, "2": 8}
    options = {"target": TARGET, "block_size": 4, "start": "gaussian", "overrides": {"2": {"block_size": 8}}}
    written = assert_writes(base, "c3a", options, lambda model: model(x), tmp_path)
    assert list(written["block_size_pattern"].values()) == [8]


def test_refusals(tmp_path: Path) -> None:
    for name, layer in {"conv": nn.Conv2d(4, 6, 3), "table": nn.Embedding(8, 4)}.items():
        injection = peftcore.apply(One(layer), "c3a", target="layer", block_size=2)
        with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
            injection.save(tmp_path / name, format="peft")
