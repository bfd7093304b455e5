"""HRA in folders of peft, both ways."""

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

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(12, 7), (2, 3, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
}


@pytest.mark.parametrize("gram_schmidt", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_both_ways(name: str, gram_schmidt: bool, tmp_path: Path) -> None:
    build, shape = LAYERS[name]
    base, x = One(build()), torch.randn(shape)
    config = peft.HRAConfig(target_modules=["layer"], r=4, apply_GS=gram_schmidt, init_weights=not gram_schmidt)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert (injection.config.rank, injection.config.gram_schmidt) == (4, gram_schmidt)
    options = {"target": "layer", "rank": 4, "gram_schmidt": gram_schmidt}
    assert_writes(base, "hra", options, lambda model: model(x), tmp_path)


def test_biases_and_a_head(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Linear(5, 3)), torch.randn(4, 6)
    config = peft.HRAConfig(target_modules=["0", "2"], r=2, bias="hra_only", modules_to_save=["3"])
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert set(injection.trained_along) >= {"0.bias", "2.bias"}
    options = {"target": ["0", "2"], "rank": 2, "train": ["0.bias", "2.bias", "3"]}
    written = assert_writes(base, "hra", options, lambda model: model(x), tmp_path)
    assert (written["bias"], written["modules_to_save"]) == ("hra_only", ["3"])


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    layers = {"grouped": nn.Conv2d(4, 6, 3, groups=2), "kernel": nn.Conv2d(4, 6, (3, 1)), "table": nn.Embedding(9, 4)}
    for name, layer in layers.items():
        injection = peftcore.apply(One(layer), "hra", target="layer", rank=2)
        with pytest.raises(ExportError, match=r"peft computes something else|not a layer that peft adapts this way"):
            injection.save(tmp_path / name, format="peft")
        assert not (tmp_path / name).exists()
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    injection = peftcore.apply(base, "hra", target=["0", "1"], rank=2, overrides={"1": {"rank": 4}})
    with pytest.raises(ExportError, match="one r for all modules"):
        injection.save(tmp_path / "ranks", format="peft")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    saved_by_peft(One(nn.Linear(12, 7)), peft.HRAConfig(target_modules=["layer"], r=3), tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"'r' is 3; .* an even number"):
        peftcore.load(One(nn.Linear(12, 7)), tmp_path / "odd")
    layer = nn.Conv2d(4, 6, 3, dilation=2, padding=2)
    saved_by_peft(One(layer), peft.HRAConfig(target_modules=["layer"], r=2), tmp_path / "dilated")
    with pytest.raises(CheckpointError, match=r"layer: peft computes something else with .* dilation"):
        peftcore.load(One(layer), tmp_path / "dilated")
