"""VeRA in folders of peft, both ways, with its matrices in the file and without."""

from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import CheckpointError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TARGET = ["0", "2"]


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), Conv1D(14, 8), nn.Linear(14, 4))


@pytest.mark.parametrize("saved", [True, False])
def test_both_ways(saved: bool, tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    config = peft.VeraConfig(
        target_modules=TARGET, r=5, projection_prng_key=3, save_projection=saved, vera_dropout=0.1, bias="vera_only"
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    assert found == {"rank": 5, "d_initial": 0.1, "dropout": 0.1, "projection_seed": 3, "store_basis": saved}
    options = {"target": TARGET, "rank": 6, "projection_seed": 2, "store_basis": not saved}
    assert_writes(base, "vera", options, lambda model: model(x), tmp_path)


def test_the_matrices_in_the_file_count(tmp_path: Path) -> None:
    """Other ones than the seed draws, as on another machine, and larger ones, as for an adapter beside."""
    base, x = host(), torch.randn(2, 3, 12)

    def turn(model: nn.Module) -> None:
        model.base_model.vera_A["default"].neg_().add_(0.1)

    assert_reads(base, peft.VeraConfig(target_modules=TARGET, r=5), lambda model: model(x), tmp_path, turn)
    ours = deepcopy(base)
    peftcore.load(ours, tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_B"] = torch.cat([tensors["base_model.vera_B"], torch.randn(3, 5)])
    save_file(tensors, file, {"format": "pt"})
    peftcore.load(base, tmp_path / "theirs")
    assert torch.equal(base(x), ours(x))


def test_refusals(tmp_path: Path) -> None:
    for name, layer in {"conv": nn.Conv2d(4, 6, 3), "table": nn.Embedding(9, 4)}.items():
        with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
            peftcore.apply(One(layer), "vera", target="layer", rank=3).save(tmp_path / name, format="peft")
    options = {"target": TARGET, "rank": 4, "overrides": {"2": {"projection_seed": 7}}}
    with pytest.raises(ExportError, match="one projection_prng_key for all modules"):
        peftcore.apply(host(), "vera", **options).save(tmp_path / "seeds", format="peft")
    peftcore.apply(host(), "vera", target=TARGET, rank=4).save(tmp_path / "lacking", format="peft")
    file = tmp_path / "lacking" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if "vera_A" not in name}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing vera_A"):
        peftcore.load(host(), tmp_path / "lacking")
