"""RoAd in folders of peft, both ways."""

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
TARGET = ["0", "2"]


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_both_ways(variant: int, tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(2, 3, 12)
    theirs = {"variant": f"road_{variant}", "group_size": 4}
    config = peft.RoadConfig(target_modules=TARGET, **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    ours = {"variant": variant, "group_size": 4}
    assert injection.config.model_dump(exclude={"method", "overrides"}) == ours
    written = assert_writes(base, "road", {"target": TARGET, **ours}, lambda model: model(x), tmp_path)
    assert theirs == {name: written[name] for name in theirs}


def test_refusals(tmp_path: Path) -> None:
    saved_by_peft(One(nn.Linear(12, 8)), peft.RoadConfig(target_modules=["layer"], group_size=4), tmp_path / "later")
    text = (tmp_path / "later" / "adapter_config.json").read_text()
    (tmp_path / "later" / "adapter_config.json").write_text(text.replace("road_1", "road_3"))
    with pytest.raises(CheckpointError, match="variant = 'road_3'"):
        peftcore.load(One(nn.Linear(12, 8)), tmp_path / "later")
    for name, layer in {"conv": nn.Conv2d(4, 6, 3), "table": nn.Embedding(8, 4)}.items():
        injection = peftcore.apply(One(layer), "road", target="layer")
        with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
            injection.save(tmp_path / name, format="peft")
