"""PVeRA in folders of peft, both ways, with its matrices in the file and without."""

from pathlib import Path

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TARGET = ["0", "2"]


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), Conv1D(14, 8), nn.Linear(14, 4))


@pytest.mark.parametrize("saved", [True, False])
def test_both_ways(saved: bool, tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    config = peft.PveraConfig(
        target_modules=TARGET, r=5, projection_prng_key=3, save_projection=saved, pvera_dropout=0.1, bias="pvera_only"
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config.model_dump(exclude={"method", "overrides", "d_initial", "kl"})
    more = {"dropout": 0.1, "sample": "training", "store_basis": saved}
    assert found == {"rank": 5, "projection_seed": 3, **more}
    options = {"target": TARGET, "rank": 6, "projection_seed": 2, "store_basis": not saved}
    assert_writes(base, "pvera", options, lambda model: model(x), tmp_path)


def test_what_is_drawn_in_evaluation(tmp_path: Path) -> None:
    """Each pass of both draws anew, from the same seed the same."""

    def run(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(0)
        return model(x)

    base, x = host(), torch.randn(2, 3, 12)
    config = peft.PveraConfig(target_modules=TARGET, r=5, sample_at_inference=True, generator_seed=None)
    assert assert_reads(base, config, run, tmp_path).config.sample == "always"
    assert_writes(base, "pvera", {"target": TARGET, "rank": 6, "sample": "always"}, run, tmp_path)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        peftcore.apply(One(nn.Conv2d(4, 6, 3)), "pvera", target="layer").save(tmp_path / "conv", format="peft")
    with pytest.raises(ExportError, match="peft samples in training at least"):
        peftcore.apply(host(), "pvera", target=TARGET, sample="never").save(tmp_path / "never", format="peft")
