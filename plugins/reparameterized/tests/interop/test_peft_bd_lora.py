"""BD-LoRA in folders of peft, both ways."""

import json
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


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def test_both_ways(tmp_path: Path) -> None:
    """One layer of each kind, and one without blocks."""
    base, x = host(), torch.randn(2, 3, 12)
    blocks = {"target_modules_bd_a": ["2"], "target_modules_bd_b": ["0"], "nblocks": 2, "match_strict": False}
    theirs = {"r": 4, "lora_alpha": 90, "lora_dropout": 0.1, "use_rslora": True}
    config = peft.LoraConfig(
        target_modules=["0", "2", "4"],
        init_lora_weights=False,
        use_bdlora=peft.tuners.lora.BdLoraConfig(**blocks),
        **theirs,
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert injection.method.name == "bd_lora"
    read = {path: injection.config.at(path) for path in ("0", "2", "4")}
    assert {path: (each.blocks, each.cut_inputs) for path, each in read.items()} == {
        "0": (2, []),
        "2": (2, ["*"]),
        "4": (1, []),
    }
    ours = {"rank": 4, "alpha": 90.0, "scaling": "sqrt_rank", "dropout": 0.1}
    assert all(getattr(read["0"], name) == value for name, value in ours.items())
    options = {"target": ["0", "2", "4"], **ours, "blocks": 2, "cut_inputs": ["2"], "overrides": {"4": {"blocks": 1}}}
    written = assert_writes(base, "bd_lora", options, lambda model: model(x), tmp_path)
    assert written["use_bdlora"] == blocks
    assert {name: written[name] for name in theirs} == theirs


def test_refusals(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3)), "bd_lora", target="layer", rank=4)
    with pytest.raises(ExportError, match="factors in blocks, which it has only in linear layers"):
        injection.save(tmp_path / "refused", format="peft")
    injection = peftcore.apply(host(), "bd_lora", target=["0", "2"], rank=12, blocks=2, overrides={"2": {"blocks": 3}})
    with pytest.raises(ExportError, match=r"one number of blocks, but these have \[2, 3\]"):
        injection.save(tmp_path / "refused", format="peft")
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "up_down": nn.Linear(4, 4)})
    injection = peftcore.apply(model, "bd_lora", target=["up", "up_down"], rank=4, cut_inputs=["up_down"])
    with pytest.raises(ExportError, match="up_down has one in common with another"):
        injection.save(tmp_path / "refused", format="peft")
    cut = peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["layer"], nblocks=2)
    saved_by_peft(
        One(nn.Linear(12, 8)), peft.LoraConfig(target_modules=["layer"], r=4, use_bdlora=cut), tmp_path / "in"
    )
    path = tmp_path / "in" / "adapter_config.json"
    options = json.loads(path.read_text())
    for told, message in (({"nblocks": 4}, "shape"), ({"target_modules_bd_b": ["lay"]}, "blocks in both factors")):
        path.write_text(json.dumps({**options, "use_bdlora": {**options["use_bdlora"], **told}}))
        with pytest.raises(CheckpointError, match=message):
            peftcore.load(One(nn.Linear(12, 8)), tmp_path / "in")
