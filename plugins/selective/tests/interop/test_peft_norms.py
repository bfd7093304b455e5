"""Norm tuning in folders of peft, both ways."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from safetensors.torch import load_file
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
NORMS: dict[str, Any] = {
    "layer": (lambda: nn.LayerNorm(6), (3, 6)),
    "gain only": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "group": (lambda: nn.GroupNorm(2, 6), (3, 6, 4)),
    "batch": (lambda: nn.BatchNorm1d(6), (3, 6)),
}


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_hosts(name: str, tmp_path: Path) -> None:
    base, inputs = HOSTS[name].build()
    ends = {"llama": ["input_layernorm", "norm"], "bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_f"]}
    config = peft.LNTuningConfig(target_modules=ends.get(name, ".*layer_norm"))
    injection = assert_reads(base, config, lambda model: HOSTS[name].output(model(**inputs)), tmp_path)
    assert injection.method.name == "ln_tuning"
    written = assert_writes(base, "ln_tuning", {}, lambda model: HOSTS[name].output(model(**inputs)), tmp_path)
    assert not any("bias" in path or "." in path for path in written["target_modules"])


@pytest.mark.parametrize("kind", NORMS)
def test_kinds(kind: str, tmp_path: Path) -> None:
    build, shape = NORMS[kind]
    base, x = One(build()), torch.randn(shape)
    if kind == "batch":
        base.train()(x)  # statistics of its own
    assert_reads(base, peft.LNTuningConfig(target_modules=["layer"]), lambda model: model(x), tmp_path)
    assert_writes(base, "ln_tuning", {"target": "layer"}, lambda model: model(x), tmp_path)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()


def test_a_head_trains_along(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), torch.randn(4, 6)
    config = peft.LNTuningConfig(target_modules=["0"], modules_to_save=["1"])
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert set(injection.trained_along) == {"1.weight", "1.bias"}
    assert_writes(base, "ln_tuning", {"target": "0", "train": ["1"]}, lambda model: model(x), tmp_path)


def test_refusals(tmp_path: Path) -> None:
    base = One(nn.BatchNorm1d(6))

    def other_statistics(model: nn.Module) -> None:
        model.train()(torch.randn(9, 6))

    saved_by_peft(base, peft.LNTuningConfig(target_modules=["layer"]), tmp_path / "moved", other_statistics)
    with pytest.raises(CheckpointError, match="the running_mean of layer differs from the host's"):
        peftcore.load(base, tmp_path / "moved")
    host = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))
    injection = peftcore.apply(host, "ln_tuning", target="0", train=["1.bias"])
    with pytest.raises(ExportError, match=r"1\.bias"):
        injection.save(tmp_path / "part", format="peft")
