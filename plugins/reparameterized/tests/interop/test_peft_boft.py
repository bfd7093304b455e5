"""BOFT in folders of peft, both ways; its CUDA kernel, without which it has one factor, is made of torch here."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft.tuners.boft import layer as peft_boft
from peft_folders import assert_reads, assert_writes
from torch import Tensor, nn

import peftcore
from peftcore.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(32, 7), (2, 3, 32)),
    "conv2d": (lambda: nn.Conv2d(16, 6, 3, stride=2, padding=1), (2, 16, 7, 7)),
}


class Kernel:
    """Block-diagonal matrices, of which peft uses the forward alone here."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*each) for each in blocks])]


@pytest.mark.parametrize("factors", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_both_ways(name: str, factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: Kernel())
    build, shape = LAYERS[name]
    base, x = One(build()), torch.randn(shape)
    config = peft.BOFTConfig(
        target_modules=["layer"], boft_block_size=4, boft_n_butterfly_factor=factors, bias="boft_only"
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert (injection.config.block_size, injection.config.factors) == (4, factors)
    options = {"target": "layer", "block_size": 4, "factors": factors, "train": ["layer.bias"]}
    assert_writes(base, "boft", options, lambda model: model(x), tmp_path)


def test_widths_and_factors_are_those_of_the_tensors(tmp_path: Path) -> None:
    """Blocks may be said by their number, and peft without its kernel makes one factor of what should be two."""
    base, x = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6)), torch.randn(4, 12)
    config = peft.BOFTConfig(target_modules=["0", "2"], boft_block_size=0, boft_block_num=2, boft_n_butterfly_factor=2)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = [injection.config.at(path) for path in ("0", "2")]
    assert [(each.block_size, each.factors) for each in found] == [(6, 1), (4, 1)]
    with pytest.raises(ExportError, match="one boft_block_size for all modules"):
        injection.save(tmp_path / "again", format="peft")


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    layers = {
        "such a kernel": nn.Conv2d(4, 6, (3, 1)),
        "blocks of width 4 where they do not fit; 3 would": nn.Linear(9, 6),
    }
    for reason, layer in layers.items():
        injection = peftcore.apply(One(layer), "boft", target="layer", block_size=4, factors=1)
        with pytest.raises(ExportError, match=reason):
            injection.save(tmp_path / "refused", format="peft")
