"""GLoRA in folders of peft, both ways."""

from pathlib import Path

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from safetensors.torch import load_file, save_file
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
NAMES = ("config_A_B", "config_C", "config_D_E")


@pytest.mark.parametrize(
    "kinds",
    [
        ("lora", "lora", "constant"),
        ("vector", "vector", "vector"),
        ("constant", "none", "constant"),
        ("none", "vector", "none"),
        ("lora", "none", "none"),
    ],
)
def test_both_ways(kinds: tuple[str, str, str], tmp_path: Path) -> None:
    base, x = One(nn.Linear(12, 7)), torch.randn(3, 12)
    config = peft.GloraConfig(target_modules=["layer"], r=3, **dict(zip(NAMES, kinds, strict=True)))
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    ab, c, de = kinds
    found = injection.config
    assert (found.A, found.B, found.C, found.D, found.E, found.rank) == (ab, ab, c, de, de, 3)
    options = {"target": "layer", "rank": 3, "A": ab, "B": ab, "C": c, "D": de, "E": de}
    assert_writes(base, "glora", options, lambda model: model(x), tmp_path)


def test_layers_without_a_bias_beside_those_with_one(tmp_path: Path) -> None:
    """Peft changes no bias where there is none; ours makes one, unless it is told not to."""
    base, x = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5)), torch.randn(4, 6)
    config = peft.GloraConfig(target_modules=["0", "2"], r=2)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert (injection.config.at("0").C, injection.config.at("2").C) == ("none", "lora")
    options = {"target": ["0", "2"], "rank": 2, "overrides": {"0": {"C": "none", "E": "none"}}}
    written = assert_writes(base, "glora", options, lambda model: model(x), tmp_path)
    assert (written["config_C"], written["config_D_E"]) == ("lora", "constant")


def test_a_host_with_biases_that_train(tmp_path: Path) -> None:
    base, inputs = HOSTS["bert"].build()
    config = peft.GloraConfig(target_modules=["query", "value"], modules_to_save=["classifier"])
    assert_reads(base, config, lambda model: model(**inputs).logits, tmp_path)
    assert_writes(base, "glora", {"train": ["classifier"]}, lambda model: model(**inputs).logits, tmp_path)


def test_refusals(tmp_path: Path) -> None:
    for options, match in (
        ({"A": "vector"}, "one config_A_B"),
        ({"D": "vector"}, "one config_D_E"),
        ({"overrides": {"0": {"rank": 3}}}, "one r for all"),
        ({"target": ["1", "2"]}, "2 has no bias"),
    ):
        host = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False))
        injection = peftcore.apply(host, "glora", **{"target": ["0", "1"], "rank": 2, **options})
        with pytest.raises(ExportError, match=match):
            injection.save(tmp_path / "none", format="peft")
    base = One(nn.Linear(12, 7))
    saved_by_peft(base, peft.GloraConfig(target_modules=["layer"], config_C="none"), tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.layer.glora_C.zeros"][0] = 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"glora_C\.zeros is not zero"):
        peftcore.load(base, tmp_path / "theirs")
