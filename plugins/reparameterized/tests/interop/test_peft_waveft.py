"""WaveFT in folders of peft, both ways."""

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


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 6))


@pytest.mark.parametrize("wavelet", ["db1", "db4", "sym3", None])
def test_both_ways(wavelet: str | None, tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    theirs = {"n_frequency": 30, "scaling": 9.0, "random_loc_seed": 5, "use_idwt": wavelet is not None}
    config = peft.WaveFTConfig(target_modules=TARGET, wavelet_family=wavelet or "db1", bias="waveft_only", **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    same = "db3" if wavelet == "sym3" else wavelet
    ours = {"n_frequency": 30, "alpha": 9.0, "entry_seed": 5, "wavelet": same}
    assert injection.config.model_dump(exclude={"method", "overrides"}) == ours
    options = {"target": TARGET, **ours, "train": ["0.bias", "2.bias"]}
    written = assert_writes(base, "waveft", options, lambda model: model(x), tmp_path)
    assert theirs | {"bias": "waveft_only"} == {name: written[name] for name in [*theirs, "bias"]}


def test_numbers_by_pattern_and_by_size(tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    patterns = {"n_frequency_pattern": {"2": 20}}, {"proportional_parameters": True}
    for k, options in enumerate(patterns):
        config = peft.WaveFTConfig(target_modules=TARGET, n_frequency=30, **options)
        (tmp_path / str(k)).mkdir()
        injection = assert_reads(base, config, lambda model: model(x), tmp_path / str(k))
        found = {path: len(operator.c) for path, operator in injection.operators.items()}
        assert found == ({"0": 30, "2": 20} if k == 0 else {"0": 40, "2": 20})
    options = {"target": TARGET, "n_frequency": 30, "overrides": {"2": {"n_frequency": 20}}}
    written = assert_writes(base, "waveft", options, lambda model: model(x), tmp_path)
    assert list(written["n_frequency_pattern"].values()) == [20]


def test_refusals(tmp_path: Path) -> None:
    config = peft.WaveFTConfig(target_modules=["layer"], n_frequency=30, wavelet_family="coif1")
    saved_by_peft(One(nn.Linear(12, 9)), config, tmp_path / "coif")
    with pytest.raises(CheckpointError, match="db1 to db10, not coif1"):
        peftcore.load(One(nn.Linear(12, 9)), tmp_path / "coif")
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3)), "waveft", target="layer", n_frequency=30)
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        injection.save(tmp_path / "conv", format="peft")
