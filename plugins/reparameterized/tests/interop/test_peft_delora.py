"""DeLoRA in folders of peft, both ways."""

from pathlib import Path

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes
from torch import nn

import peftcore
from peftcore.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TARGET = ["0", "2"]


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 6))


def test_both_ways(tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    theirs = {"r": 3, "delora_lambda": 9, "module_dropout": 0.1}
    config = peft.DeloraConfig(target_modules=TARGET, init_weights=False, bias="delora_only", **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    ours = {"rank": 3, "strength": 9.0, "dropout": 0.1}
    assert injection.config.model_dump(exclude={"method", "overrides"}) == ours
    options = {"target": TARGET, **ours, "train": ["0.bias", "2.bias"]}
    written = assert_writes(base, "delora", options, lambda model: model(x), tmp_path)
    assert theirs | {"bias": "delora_only"} == {name: written[name] for name in [*theirs, "bias"]}


def test_ranks_and_strengths_by_pattern(tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    patterns = {"rank_pattern": {"2": 2}, "lambda_pattern": {"0": 4.0}}
    config = peft.DeloraConfig(target_modules=TARGET, r=3, **patterns)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert {path: operator.A.shape[0] for path, operator in injection.operators.items()} == {"0": 3, "2": 2}
    assert injection.config.at("0").strength == 4.0
    options = {"target": TARGET, "rank": 3, "overrides": {"2": {"rank": 2, "strength": 4.0}}}
    written = assert_writes(base, "delora", options, lambda model: model(x), tmp_path)
    assert list(written["rank_pattern"].values()) == [2]


def test_lengths_of_columns_in_the_file_count(tmp_path: Path) -> None:
    """Those of a base that was another when the adapter was made."""
    base, x = host(), torch.randn(2, 3, 12)

    def longer(model: nn.Module) -> None:
        for name, value in model.named_buffers():
            if "w_norm" in name:
                value.mul_(1.5)

    config = peft.DeloraConfig(target_modules=TARGET, r=3)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, longer)
    torch.testing.assert_close(injection.operators["0"].n[0], 1.5 * base[0].weight.norm(dim=0))


def test_refusals(tmp_path: Path) -> None:
    for name, layer in {"conv": nn.Conv2d(4, 6, 3), "table": nn.Embedding(9, 4)}.items():
        injection = peftcore.apply(One(layer), "delora", target="layer", rank=2)
        with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
            injection.save(tmp_path / name, format="peft")
