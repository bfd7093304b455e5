"""MiSS in folders of peft, both ways."""

from pathlib import Path

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


@pytest.mark.parametrize("variant", ["bat", "mini"])
def test_other_equations_are_refused(variant: str, tmp_path: Path) -> None:
    base = One(nn.Linear(12, 8))
    config = peft.MissConfig(target_modules=["layer"], r=4, init_weights=variant, mini_r=2)
    saved_by_peft(base, config, tmp_path)
    with pytest.raises(CheckpointError, match=f"init_weights = '{variant}'"):
        peftcore.load(base, tmp_path)


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3)), "miss", target="layer", rank=4)
    with pytest.raises(ExportError, match="none of what peft adapts"):
        injection.save(tmp_path / "conv", format="peft")
