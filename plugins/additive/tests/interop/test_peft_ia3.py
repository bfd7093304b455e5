"""(IA)^3 in folders of peft, both ways."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(6, 6), (2, 3, 6)),
    "square": (lambda: nn.Linear(6, 6, bias=False), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 4, (3, 2), stride=2), (2, 4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 3, 2), (2, 4, 3, 4, 3)),
}


BOTH = [(name, on_input) for name in LAYERS for on_input in (False, True) if (name, on_input) != ("grouped", True)]
"""Inputs of grouped convolutions are not scaled here."""


@pytest.mark.parametrize(("name", "on_input"), BOTH)
def test_both_ways(name: str, on_input: bool, tmp_path: Path) -> None:
    build, shape = LAYERS[name]
    base, x = One(build()), torch.randn(shape)
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if on_input else [])
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert injection.operators["layer"].on_input is on_input
    options = {"target": "layer", "scale_inputs": ["*"] if on_input else []}
    assert_writes(base, "ia3", options, lambda model: model(x), tmp_path)


@pytest.mark.parametrize(
    ("name", "modules", "forward"),
    [
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        ("llama", ".*(k|v|down)_proj", r".*layers\.1\.mlp\.down_proj"),
        ("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        ("t5", ".*(SelfAttention.k|wo)", ["o"]),  # a bare end: no dot has to stand before it
    ],
)
def test_hosts(name: str, modules: Any, forward: Any, tmp_path: Path) -> None:
    base, inputs = HOSTS[name].build()
    config = peft.IA3Config(target_modules=modules, feedforward_modules=forward)
    injection = assert_reads(base, config, lambda model: HOSTS[name].output(model(**inputs)), tmp_path)
    found = {path.split(".")[-1] for path, operator in injection.operators.items() if operator.on_input}
    assert found == ({"down_proj"} if name == "llama" else {"c_proj"} if name == "gpt2" else {"wo"})


def test_our_roles_are_written_by_path(tmp_path: Path) -> None:
    base, inputs = HOSTS["llama"].build()
    options = {"overrides": {"*layers.0.mlp.*": {"scale_inputs": []}}}
    written = assert_writes(base, "ia3", options, lambda model: model(**inputs).logits, tmp_path)
    assert written["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert written["feedforward_modules"] == r"model\.layers\.1\.mlp\.down_proj"


def test_refusals(tmp_path: Path) -> None:
    base, _ = HOSTS["gpt2"].build()
    with pytest.raises(ExportError, match=r"c_attn:attn\.k is a part of a fused projection"):
        peftcore.apply(base, "ia3").save(tmp_path / "fused", format="peft")
    base, _ = HOSTS["moe"].build()
    injection = peftcore.apply(base, "ia3", target="experts.down")
    with pytest.raises(ExportError, match=r"experts\.down_proj is not a layer that peft adapts this way"):
        injection.save(tmp_path / "experts", format="peft")
    host = One(nn.Linear(6, 6))
    saved_by_peft(host, peft.IA3Config(target_modules=["layer"], feedforward_modules=[]), tmp_path / "unsaid")
    config = tmp_path / "unsaid" / "adapter_config.json"
    config.write_text(config.read_text().replace('"feedforward_modules": []', '"feedforward_modules": null'))
    with pytest.raises(CheckpointError, match="'feedforward_modules' is missing"):
        peftcore.load(host, tmp_path / "unsaid")
