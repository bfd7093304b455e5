"""LoRA in folders of peft where a layer is more than a product: convolutions in groups, layers that come again."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_same, assert_writes, fill, saved_by_peft
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError, HostMismatch, NotMergeable
from peftcore.testing import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
GROUPED: dict[str, Any] = {
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, groups=2, padding=1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 8, 3, groups=4, stride=2, bias=False), (2, 8, 7, 6)),
}


@pytest.mark.parametrize("name", GROUPED)
def test_in_groups(name: str, tmp_path: Path) -> None:
    """peft's A reads the channels of all groups: no weight of such a convolution computes that."""
    build, shape = GROUPED[name]
    base, x = One(build()), torch.randn(shape)
    config = peft.LoraConfig(target_modules=["layer"], r=4, lora_alpha=6)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert injection.config.across_groups
    with pytest.raises(NotMergeable):
        injection.merge()
    options = {"target": "layer", "rank": 4, "alpha": 9.0, "across_groups": True}
    assert_writes(base, "lora", options, lambda model: model(x), tmp_path)
    assert peftcore.plan(base, "lora", **options).trainable == sum(p.numel() for p in injection.parameters())
    for refused in ({"across_groups": False}, {"method": "dora"}):
        given = {"method": "lora", "target": "layer", **refused}
        one = peftcore.apply(copy.deepcopy(base), **given)
        with pytest.raises(ExportError, match="something else with groups"):
            one.save(tmp_path / "refused", format="peft")


def test_dora_in_groups_is_refused(tmp_path: Path) -> None:
    """peft takes the norms of a product that is another one than what it adds."""
    base = One(nn.Conv2d(8, 8, 3, groups=4))
    saved_by_peft(base, peft.LoraConfig(target_modules=["layer"], r=4, use_dora=True), tmp_path)
    with pytest.raises(CheckpointError, match="something else with groups"):
        peftcore.load(base, tmp_path)


RANGES = [[0, 2], [0, 2], [1, 2]]


def test_layers_that_come_again(tmp_path: Path) -> None:
    """peft replicates the layers of the model that it opens; here that is a call of its own."""
    base, inputs = HOSTS["llama"].build()
    base.config.use_cache = False
    config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=RANGES, r=4, lora_alpha=90)
    theirs = saved_by_peft(base, config, tmp_path / "theirs")
    with pytest.raises(HostMismatch, match=r"replicate_layers\(model, \[\[0, 2\], \[0, 2\], \[1, 2\]\]\) first"):
        peftcore.load(copy.deepcopy(base), tmp_path / "theirs")
    ours = copy.deepcopy(base)
    peftcore.replicate_layers(ours, RANGES)
    with torch.no_grad():
        plain = ours(**inputs).logits
    injection = peftcore.load(ours, tmp_path / "theirs")
    assert len(injection.operators) == 5
    fill(injection.parameters())
    with torch.no_grad():
        injection.save(tmp_path / "ours", format="peft")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
        assert_same(plain, ours(**inputs).logits, again(**inputs).logits)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["layer_replication"] == RANGES
    second = copy.deepcopy(base)
    peftcore.replicate_layers(second, RANGES)
    peftcore.load(second, tmp_path / "theirs")
    with torch.no_grad():
        assert_same(plain, second(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("ranges", [[[0]], [3], [["a", "b"]], [[0, 10**12]], [[0, 1]] * 5000, "x"])
def test_damaged_ranges_are_refused(ranges: Any, tmp_path: Path) -> None:
    base, _ = HOSTS["llama"].build()
    saved_by_peft(base, peft.LoraConfig(target_modules=["q_proj"]), tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**options, "layer_replication": ranges}))
    with pytest.raises(CheckpointError, match="layer_replication"):
        peftcore.load(base, tmp_path)
