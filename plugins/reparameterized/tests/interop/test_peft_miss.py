"""MiSS in folders of peft, both ways."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


@pytest.mark.parametrize("rank", [4, 5])  # 5 leaves a shard that is shorter
def test_both_ways(rank: int, tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 7, bias=False)), torch.randn(2, 3, 12)
    config = peft.MissConfig(target_modules=["0", "2"], r=rank, miss_dropout=0.1, bias="MiSS_only")
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert (injection.config.rank, injection.config.dropout) == (rank, 0.1)
    options = {"target": ["0", "2"], "rank": rank, "dropout": 0.2, "train": ["0.bias"]}
    written = assert_writes(base, "miss", options, lambda model: model(x), tmp_path)
    assert (written["r"], written["miss_dropout"], written["bias"]) == (rank, 0.2, "MiSS_only")


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bat": ({}, {"bat": True}),
    "mini": ({"mini_r": 2, "miss_dropout": 0.1}, {"outputs": 2, "dropout": 0.1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path) -> None:
    (theirs, ours), x = VARIANTS[variant], torch.randn(2, 3, 12)
    base = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))
    config = peft.MissConfig(target_modules=["0", "2"], r=4, init_weights=variant, **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    assert found == {"rank": 4, "dropout": 0.0, "outputs": None, "bat": False, **ours}
    written = assert_writes(base, "miss", {"target": ["0", "2"], "rank": 4, **ours}, lambda model: model(x), tmp_path)
    assert written["init_weights"] == variant


def test_refusals(tmp_path: Path) -> None:
    base = One(nn.Linear(12, 8))
    saved_by_peft(base, peft.MissConfig(target_modules=["layer"], r=4), tmp_path / "later")
    text = (tmp_path / "later" / "adapter_config.json").read_text()
    (tmp_path / "later" / "adapter_config.json").write_text(text.replace('"init_weights": true', '"init_weights": "x"'))
    with pytest.raises(CheckpointError, match="init_weights = 'x'"):
        peftcore.load(base, tmp_path / "later")
    for name, layer in {
        "not a layer that peft adapts this way": nn.Conv2d(4, 6, 3),
        "above the 3 inputs": nn.Linear(3, 4),
    }.items():
        injection = peftcore.apply(One(layer), "miss", target="layer", rank=4)
        with pytest.raises(ExportError, match=name):
            injection.save(tmp_path / "refused", format="peft")
