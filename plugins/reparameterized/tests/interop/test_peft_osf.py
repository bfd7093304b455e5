"""OSF in folders of peft, both ways: the decomposition is that of the model's weight."""

from pathlib import Path

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
TARGET = ["0", "2"]


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 14), nn.Linear(14, 4))


def test_both_ways(tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    config = peft.OSFConfig(target_modules=TARGET, effective_rank=0.5, rank_pattern={"2": 3})
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert [injection.config.at(path).effective_rank for path in TARGET] == [4, 3]
    options = {"target": ["0", "2", "3"], "overrides": {"2": {"effective_rank": 0.3}}}
    written = assert_writes(base, "osf", options, lambda model: model(x), tmp_path)
    assert (written["effective_rank"], written["rank_pattern"]) == (2, {"^0$": 4})


def test_refusals(tmp_path: Path) -> None:
    for name, layer in {"conv": nn.Conv2d(4, 8, 3), "conv1d": Conv1D(8, 4)}.items():
        with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
            peftcore.apply(One(layer), "osf", target="layer").save(tmp_path / name, format="peft")
