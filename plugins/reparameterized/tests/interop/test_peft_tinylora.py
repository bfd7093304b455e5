"""TinyLoRA in folders of peft, both ways, with what is drawn in the file and without; embeddings too."""

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


def host() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 8), nn.Tanh(), Conv1D(14, 8), nn.Linear(14, 4))


@torch.no_grad()
def stronger(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "tinylora_v" in name:
            parameter.mul_(4)


@pytest.mark.parametrize("saved", [True, False])
def test_both_ways(saved: bool, tmp_path: Path) -> None:
    base, x, target = host(), torch.randint(9, (2, 3)), ["0", "1", "3"]
    config = peft.TinyLoraConfig(
        target_modules=target, r=3, u=20, weight_tying=0.5, projection_seed=7, save_projection=saved
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, stronger)
    found = injection.config.model_dump(exclude={"method", "overrides", "dropout"})
    assert found == {"rank": 3, "u": 20, "tying": 0.5, "projection_seed": 7, "store_basis": saved}
    assert sorted(injection.shared) == ["v_0", "v_1"]
    options = {"target": ["0", "1", "3", "4"], "u": 30, "rank": 3, "store_basis": saved}
    assert_writes(base, "tinylora", options, lambda model: model(x), tmp_path)


def test_dropout(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(3, 12)
    config = peft.TinyLoraConfig(target_modules=["0"], tinylora_dropout=0.1, bias="tinylora_only")
    assert assert_reads(base, config, lambda model: model(x), tmp_path, stronger).config.dropout == 0.1


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        peftcore.apply(One(nn.Conv2d(4, 8, 3)), "tinylora", target="layer").save(tmp_path, format="peft")
