"""LoHa in folders of peft, both ways."""

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
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2), (2, 4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
}


def larger(model: nn.Module) -> None:
    """Products of four small numbers would hardly move the output."""
    for name, parameter in model.named_parameters():
        if "hada" in name:
            parameter.data.mul_(4)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_both_ways(name: str, tucker: bool, tmp_path: Path) -> None:
    build, shape = LAYERS[name]
    base, x = One(build()), torch.randn(shape)
    config = peft.LoHaConfig(target_modules=["layer"], r=3, alpha=5, use_effective_conv2d=tucker, init_weights=False)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, larger)
    assert (injection.config.rank, injection.config.alpha, injection.config.tucker) == (3, 5, tucker)
    options = {"target": "layer", "rank": 3, "alpha": 50.0, "tucker": tucker}
    assert_writes(base, "loha", options, lambda model: model(x), tmp_path)


def test_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(4, 6)
    patterns: dict[str, Any] = {"rank_pattern": {"2": 4}, "alpha_pattern": {r"^[02]$": 7}}
    config = peft.LoHaConfig(target_modules=["0", "2"], r=3, alpha=5, init_weights=False, **patterns)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, larger)
    ranks = [(injection.config.at(path).rank, injection.config.at(path).alpha) for path in ("0", "2")]
    assert ranks == [(3, 7), (4, 7)]
    options = {"target": ["0", "2"], "rank": 3, "alpha": 90.0, "overrides": {"2": {"rank": 2, "alpha": 40.0}}}
    written = assert_writes(base, "loha", options, lambda model: model(x), tmp_path)
    assert (len(written["rank_pattern"]), len(written["alpha_pattern"])) == (1, 1)


def test_refusals(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Embedding(9, 4)), "loha", target="layer", rank=2)
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        injection.save(tmp_path / "table", format="peft")
    base = One(nn.Linear(12, 7))
    injection = peftcore.apply(base, "loha", target="layer", rank=2, train=["layer.bias"])
    with pytest.raises(ExportError, match=r"layer\.bias"):  # this type has no `bias`
        injection.save(tmp_path / "bias", format="peft")
    base = One(nn.Linear(12, 7))
    saved_by_peft(base, peft.LoHaConfig(target_modules=["layer"], r=3), tmp_path / "wrong")
    text = (tmp_path / "wrong" / "adapter_config.json").read_text()
    (tmp_path / "wrong" / "adapter_config.json").write_text(text.replace('"r": 3', '"r": 2'))
    with pytest.raises(CheckpointError, match=r"hada_w1_b has shape \(3, 12\)"):
        peftcore.load(base, tmp_path / "wrong")
