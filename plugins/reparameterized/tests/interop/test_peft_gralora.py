"""GraLoRA in folders of peft, both ways."""

from pathlib import Path

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


@pytest.mark.parametrize("hybrid_rank", [0, 2])
def test_both_ways(hybrid_rank: int, tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), Conv1D(6, 9)), torch.randn(2, 3, 12)
    theirs = {"r": 6, "alpha": 90, "gralora_k": 3, "hybrid_r": hybrid_rank, "gralora_dropout": 0.1}
    config = peft.GraloraConfig(target_modules=TARGET, init_weights=False, bias="gralora_only", **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    ours = {"rank": 6, "alpha": 90.0, "blocks": 3, "hybrid_rank": hybrid_rank, "dropout": 0.1}
    assert injection.config.model_dump(exclude={"method", "overrides"}) == ours
    options = {"target": TARGET, **ours, "train": ["0.bias", "2.bias"]}
    written = assert_writes(base, "gralora", options, lambda model: model(x), tmp_path)
    assert theirs | {"bias": "gralora_only"} == {name: written[name] for name in [*theirs, "bias"]}


def test_refusals(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3)), "gralora", target="layer", rank=4)
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        injection.save(tmp_path / "refused", format="peft")
    saved_by_peft(One(nn.Linear(12, 8)), peft.GraloraConfig(target_modules=["layer"], r=4), tmp_path / "later")
    text = (tmp_path / "later" / "adapter_config.json").read_text()
    (tmp_path / "later" / "adapter_config.json").write_text(text.replace('"gralora_k": 2', '"gralora_k": 4'))
    with pytest.raises(CheckpointError, match="shape"):
        peftcore.load(One(nn.Linear(12, 8)), tmp_path / "later")
