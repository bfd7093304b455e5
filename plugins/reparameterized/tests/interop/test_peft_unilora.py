"""Uni-LoRA in folders of peft, both ways, with its indices in the file and drawn as peft draws them."""

from pathlib import Path

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import CheckpointError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


class Many(nn.Module):
    """More modules than one digit numbers: in a file they are sorted otherwise than in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(11)))
        self.out = Conv1D(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)


@torch.no_grad()
def stronger(model: nn.Module) -> None:
    """Products of small numbers would hardly move the outputs."""
    for name, parameter in model.named_parameters():
        if "theta" in name:
            parameter.mul_(5)


@pytest.mark.parametrize("saved", [True, False])
def test_both_ways(saved: bool, tmp_path: Path) -> None:
    base, x, targets = Many(), torch.randn(2, 3, 6), [*(str(n) for n in range(1, 11)), "out"]
    config = peft.UniLoraConfig(
        target_modules=targets, r=3, theta_d_length=50, unilora_dropout=0.1, proj_seed=3, save_indices=saved
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, stronger)
    assert len(injection.operators) == 11
    found = injection.config.model_dump(exclude={"method", "overrides", "theta_bound"})
    assert found == {"rank": 3, "theta_length": 50, "dropout": 0.1, "projection_seed": 3, "store_indices": True}
    options = {"target": ["*.[2-5]", "out"], "theta_length": 40, "theta_bound": 0.5}
    assert_writes(base, "uni_lora", options, lambda model: model(x), tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    def host() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4))

    config = peft.UniLoraConfig(target_modules=["0"], r=2, theta_d_length=9, save_indices=True)
    file = tmp_path / "adapter_model.safetensors"
    for name, value, message in (("indices", 9, "outside of the 9"), ("scales", 0.1, "scales do not match")):
        saved_by_peft(host(), config, tmp_path)
        tensors = load_file(file)
        tensors[f"base_model.model.0.unilora_{name}_A"].fill_(value)
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            peftcore.load(host(), tmp_path)


def test_refusals(tmp_path: Path) -> None:
    for name, layer in {"conv": nn.Conv2d(4, 8, 3), "table": nn.Embedding(8, 4)}.items():
        with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
            peftcore.apply(One(layer), "uni_lora", target="layer").save(tmp_path / name, format="peft")
