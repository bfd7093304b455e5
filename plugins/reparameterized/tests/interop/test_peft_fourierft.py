"""FourierFT in folders of peft, both ways: the positions come from the seed alone."""

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


@pytest.mark.parametrize("transposed", [False, True])
def test_both_ways(transposed: bool, tmp_path: Path) -> None:
    base, x = One(Conv1D(7, 12) if transposed else nn.Linear(12, 7)), torch.randn(2, 3, 12)
    config = peft.FourierFTConfig(target_modules=["layer"], n_frequency=20, scaling=40.0, random_loc_seed=5)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert (injection.config.n_frequency, injection.config.alpha, injection.config.entry_seed) == (20, 40.0, 5)
    options = {"target": "layer", "n_frequency": 30, "alpha": 60.0, "entry_seed": 3}
    assert_writes(base, "fourierft", options, lambda model: model(x), tmp_path)


def test_numbers_by_pattern_and_biases(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 5))), torch.randn(4, 6)
    numbers = {"0": 9, "2.0": 14}  # "0" means what stands behind a dot too, and is asked first
    config = peft.FourierFTConfig(
        target_modules=["0", "2.0"], n_frequency=20, n_frequency_pattern=numbers, bias="fourier_only"
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert [injection.config.at(path).n_frequency for path in ("0", "2.0")] == [9, 9]
    options = {
        "target": ["0", "2.0"],
        "n_frequency": 10,
        "train": ["0.bias", "2.0.bias"],
        "overrides": {"2.0": {"n_frequency": 15}},
    }
    written = assert_writes(base, "fourierft", options, lambda model: model(x), tmp_path)
    assert (written["n_frequency"], written["n_frequency_pattern"]) == (10, {"2.0": 15})
    assert written["bias"] == "fourier_only"


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3)), "fourierft", target="layer", n_frequency=9)
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        injection.save(tmp_path / "conv", format="peft")
    base = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 5)), nn.Linear(5, 5))
    options = {"target": ["0", "1.0", "2"], "n_frequency": 9, "overrides": {"0": {"n_frequency": 8}}}
    with pytest.raises(ExportError, match=r"pattern for the n_frequency of 0 would also match 1\.0"):
        peftcore.apply(base, "fourierft", **options).save(tmp_path / "pattern", format="peft")
