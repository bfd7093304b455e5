"""VB-LoRA in folders of peft, both ways, with all logits in the file or the largest alone."""

from pathlib import Path
from typing import Any

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
TARGET = ["0", "2"]
OPTIONS: dict[str, Any] = {"num_vectors": 6, "vector_length": 4, "topk": 3}


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), Conv1D(16, 8), nn.Linear(16, 4))


def stronger(model: nn.Module) -> None:
    """Products of small numbers would hardly move the outputs."""
    for name, parameter in model.named_parameters():
        if "bank" in name:
            parameter.data.mul_(5)


@pytest.mark.parametrize("shortened", [False, True])
def test_both_ways(shortened: bool, tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    config = peft.VBLoRAConfig(
        target_modules=TARGET, r=3, vblora_dropout=0.1, bias="vblora_only", save_only_topk_weights=shortened, **OPTIONS
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, stronger)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    more = {"rank": 3, "dropout": 0.1, "bank_bound": 0.02, "logits_std": 0.1, "logits_ratio": 1.0}
    assert found == {**more, **OPTIONS}
    never = (injection.state_dict()["0.logits_A"] == -1e4).sum(-1)
    assert (never == (3 if shortened else 0)).all()
    assert_writes(base, "vb_lora", {"target": TARGET, **OPTIONS, "bank_bound": 0.5}, lambda model: model(x), tmp_path)


def test_a_shortened_one_trains_on_with_the_vectors_that_it_has(tmp_path: Path) -> None:
    config = peft.VBLoRAConfig(target_modules=TARGET, r=3, save_only_topk_weights=True, **OPTIONS)
    base = host()
    saved_by_peft(base, config, tmp_path / "theirs", stronger)
    injection = peftcore.load(base, tmp_path / "theirs", trainable=True)
    base(torch.randn(5, 12)).square().sum().backward()
    logits = injection.operators["0"].get_parameter("logits_A")
    assert logits.grad is not None and logits.grad.any()
    assert not logits.grad[logits == -1e4].any()


@pytest.mark.parametrize(
    ("part", "value", "message"), [("indices", 6, "outside of the 6"), ("weights", 0.9, "with a sum above 1")]
)
def test_damaged_files_are_refused(part: str, value: float, message: str, tmp_path: Path) -> None:
    config = peft.VBLoRAConfig(target_modules=TARGET, r=3, save_only_topk_weights=True, **OPTIONS)
    saved_by_peft(host(), config, tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.0.vblora_logits_A_topk_{part}"].fill_(value)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(host(), tmp_path / "theirs")


def test_refusals(tmp_path: Path) -> None:
    for name, layer in {"conv": nn.Conv2d(4, 8, 3), "table": nn.Embedding(8, 4)}.items():
        with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
            peftcore.apply(One(layer), "vb_lora", target="layer", **OPTIONS).save(tmp_path / name, format="peft")
    uneven = peftcore.apply(host(), "vb_lora", target=TARGET, **{**OPTIONS, "vector_length": 3})
    with pytest.raises(ExportError, match="vector_length=3 that does not divide 12 and 8"):
        uneven.save(tmp_path / "uneven", format="peft")
