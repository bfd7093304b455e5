"""AdaLoRA in folders of peft, both ways, also when ranks have fallen."""

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
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(12, 7), (2, 3, 12)),
    "transposed": (lambda: Conv1D(7, 12), (2, 3, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 7, 6)),
}
SCHEDULE = {"tinit": 3, "tfinal": 4, "deltaT": 2, "beta1": 0.7, "beta2": 0.8, "orth_reg_weight": 0.2}
OURS = {"warmup": 3, "final": 4, "interval": 2, "beta1": 0.7, "beta2": 0.8, "orthogonality": 0.2}


@pytest.mark.parametrize("name", LAYERS)
def test_both_ways(name: str, tmp_path: Path) -> None:
    build, shape = LAYERS[name]
    base, x = One(build()), torch.randn(shape)
    config = peft.AdaLoraConfig(
        target_modules=["layer"], init_r=5, target_r=2, lora_alpha=60, lora_dropout=0.1, total_step=50, **SCHEDULE
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    assert found == {"rank": 5, "target_rank": 2, "alpha": 60.0, "dropout": 0.1, **OURS}
    options = {"target": "layer", "rank": 5, "alpha": 90.0, "dropout": 0.1, **OURS}
    written = assert_writes(base, "adalora", options, lambda model: model(x), tmp_path)
    assert {key: written[key] for key in SCHEDULE} == SCHEDULE


def test_ranks_that_have_fallen(tmp_path: Path) -> None:
    """peft keeps what its pattern of booleans chose, nothing at all at some sites, and the first rank in its scale."""
    base, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Linear(5, 5)), torch.randn(4, 6)
    kept = {"0": [True, False, True, False], "2": [False] * 4, "3": [True] * 4}

    def prune(model: Any) -> None:
        pattern = {f"{path}.lora_E.default": chosen for path, chosen in kept.items()}
        model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)
        model.peft_config["default"].rank_pattern = pattern

    config = peft.AdaLoraConfig(
        target_modules=list(kept), init_r=4, target_r=2, lora_alpha=60, total_step=50, bias="lora_only"
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, prune)
    assert {injection.config.at(path).rank for path in kept} == {4}
    assert [int(injection.operators[path].E.count_nonzero()) for path in kept] == [2, 0, 4]


def test_refusals(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Conv1d(4, 6, 3)), "adalora", target="layer", rank=2)
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        injection.save(tmp_path / "conv", format="peft")
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3, groups=2)), "adalora", target="layer", rank=2)
    with pytest.raises(ExportError, match="something else with groups"):
        injection.save(tmp_path / "groups", format="peft")
    base = One(nn.Linear(12, 7))
    saved_by_peft(base, peft.AdaLoraConfig(target_modules=["layer"], total_step=50), tmp_path / "wrong")
    text = (tmp_path / "wrong" / "adapter_config.json").read_text()
    (tmp_path / "wrong" / "adapter_config.json").write_text(text.replace('"init_r": 12', '"init_r": 9'))
    with pytest.raises(CheckpointError, match=r"lora_A has shape \(12, 12\)"):
        peftcore.load(base, tmp_path / "wrong")
