"""RandLoRA in folders of peft, both ways, with its bases in the file and drawn as peft draws them."""

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
from peftcore.errors import ExportError
from peftcore.testing.tools import default_dtype

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TARGET = ["0", "2"]


def host() -> nn.Module:
    """Wide and narrow by turns: peft's bases are as large as a site of both sizes would need."""
    return nn.Sequential(nn.Linear(6, 14), nn.Tanh(), Conv1D(8, 14), nn.Linear(8, 4))


@pytest.mark.parametrize("basis", ["uniform", "sparse", "very_sparse"])
@pytest.mark.parametrize("saved", [True, False])
def test_both_ways(saved: bool, basis: str, tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 6)
    kind: dict[str, Any] = {} if basis == "uniform" else {basis: True}
    config = peft.RandLoraConfig(
        target_modules=TARGET, r=3, randlora_alpha=9, projection_prng_key=5, save_projection=saved, **kind
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config
    assert (found.rank, found.alpha, found.basis, found.projection_seed) == (3, 9.0, basis, 5)
    scaling = "bases" if saved else "rank"
    options = {"target": TARGET, "rank": 3, "alpha": 9.0, "basis": basis, "projection_seed": 2, "scaling": scaling}
    assert_writes(base, "randlora", options, lambda model: model(x), tmp_path)


def test_the_bases_in_the_file_count(tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 6)

    def turn(model: nn.Module) -> None:
        model.base_model.randlora_B["default"].neg_().add_(0.1)

    config = peft.RandLoraConfig(target_modules=TARGET, r=3, bias="randlora_only")
    assert_reads(base, config, lambda model: model(x), tmp_path, turn)


@pytest.mark.parametrize("basis", ["uniform", "sparse"])
def test_bases_that_are_drawn_do_not_depend_on_the_default_dtype(basis: str, tmp_path: Path) -> None:
    base = host()
    config = peft.RandLoraConfig(target_modules=TARGET, r=3, save_projection=False, sparse=basis == "sparse")
    saved_by_peft(base, config, tmp_path / "drawn")
    expected = peftcore.load(host(), tmp_path / "drawn").state_dict()
    for dtype in (torch.bfloat16, torch.float64):
        model = host()
        with default_dtype(dtype):
            found = peftcore.load(model, tmp_path / "drawn").state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_refusals(tmp_path: Path) -> None:
    for name, layer in {"conv": nn.Conv2d(4, 6, 3), "table": nn.Embedding(9, 4)}.items():
        with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
            peftcore.apply(One(layer), "randlora", target="layer", rank=3).save(tmp_path / name, format="peft")
    options = {"target": TARGET, "rank": 4, "overrides": {"2": {"basis": "sparse"}}}
    with pytest.raises(ExportError, match="peft has one sparse for all modules"):
        peftcore.apply(host(), "randlora", **options).save(tmp_path / "bases", format="peft")
