"""rsLoRA, the scaling="sqrt_rank" of LoRA: peft's use_rslora gives the same numbers, and the size of what is learned
does not depend on the rank, which is the paper's point."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import ConfigError

ALPHA = 5.0
EXACT = 1e-12
LAYERS = {
    "linear": lambda: (nn.Linear(12, 7), torch.randn(2, 3, 12).double()),
    "transposed": lambda: (Conv1D(7, 12), torch.randn(2, 3, 12).double()),
    "convolution": lambda: (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), torch.randn(2, 4, 7, 6).double()),
    "embedding": lambda: (nn.Embedding(9, 7), torch.randint(9, (2, 4))),
}


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= EXACT * expected.abs().max()


@pytest.mark.parametrize("rank", [1, 3, 64])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:::peft")
def test_beside_peft(kind: str, rank: int) -> None:
    layer, x = LAYERS[kind]()
    base = One(layer).double()
    model = deepcopy(base)
    options = {"rank": rank, "alpha": ALPHA, "scaling": "sqrt_rank", "dtype": "float64"}
    injection = peftcore.apply(model, "lora", target="layer", **options)
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, use_rslora=True, target_modules=["layer"])
    theirs = peft.inject_adapter_in_model(config, deepcopy(base)).double()
    A, B, scale = injection.operators["layer"].factors()
    other = theirs.layer
    embedding = kind == "embedding"
    pair = (other.lora_embedding_A, other.lora_embedding_B) if embedding else (other.lora_A, other.lora_B)
    pairs = [
        (ours, held["default"] if embedding else held["default"].weight)
        for ours, held in zip((A, B), pair, strict=True)
    ]
    with torch.no_grad():
        for ours, held in pairs:
            held.copy_(ours.normal_(0, 0.1).view(held.shape))
    assert scale == pytest.approx(other.scaling["default"], rel=1e-15)
    found, expected = model(x), theirs(x)
    assert (found - base(x)).abs().max() > 1000 * EXACT
    assert_same(found, expected)
    direction = torch.randn_like(found)
    for output in (found, expected):
        (output * direction).sum().backward()
    for ours, held in pairs:
        assert held.grad.abs().max() > 0
        assert_same(ours.grad, held.grad.view(ours.shape))
    injection.merge()
    other.merge()
    assert_same(model.layer.weight, other.get_base_layer().weight)


def scale_of(**options: Any) -> float:
    return peftcore.apply(One(nn.Linear(6, 4)), "lora", target="layer", **options).operators["layer"].factors()[2]


def test_scales() -> None:
    """As written, whatever other libraries do; without the option LoRA's own."""
    assert scale_of(rank=9, alpha=6.0, scaling="sqrt_rank") == 2.0
    assert scale_of(rank=9, alpha=6.0, scaling="rank") == scale_of(rank=9, alpha=6.0) == 6 / 9
    assert scale_of(rank=4, alpha=6.0, scaling="sqrt_rank", overrides={"layer": {"scaling": "rank"}}) == 1.5
    with pytest.raises(ConfigError, match="scaling"):
        scale_of(scaling="sqrt")


def change_of_one_step(rank: int, scaling: str) -> float:
    """The size of what one step of SGD changes in the output of a wide layer."""
    torch.manual_seed(0)
    model = One(nn.Linear(400, 200)).double()
    x, direction = torch.randn(1, 400).double(), torch.randn(1, 200).double()
    before = model(x).detach()
    options = {"rank": rank, "alpha": 1.0, "scaling": scaling, "dtype": "float64"}
    injection = peftcore.apply(model, "lora", target="layer", **options)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.01)
    (model(x) * direction).sum().backward()
    optimizer.step()
    return (model(x) - before).square().mean().sqrt().item()


def test_what_a_step_changes_does_not_depend_on_the_rank() -> None:
    """The change is s^2 |A x|^2 times the gradient, a sum over the rank, so with s = alpha / sqrt(rank) it stays; with
    alpha / rank it falls as 1 / rank."""
    stable = change_of_one_step(256, "sqrt_rank") / change_of_one_step(16, "sqrt_rank")
    falling = change_of_one_step(256, "rank") / change_of_one_step(16, "rank")
    assert 0.6 < stable < 1.6
    assert falling == pytest.approx(stable / 16, rel=1e-6)


def test_files_know_the_scale(tmp_path: Path) -> None:
    """An adapter that came back with alpha / rank would be another one."""
    base, x = One(nn.Linear(6, 4)), torch.randn(3, 6)
    model = deepcopy(base)
    injection = peftcore.apply(model, "lora", target="layer", rank=4, scaling="sqrt_rank")
    nn.init.normal_(injection.operators["layer"].B)
    injection.save(tmp_path / "adapter")
    expected = model(x)
    loaded = peftcore.load(base, tmp_path / "adapter")
    assert loaded.operators["layer"].factors()[2] == 8 / math.sqrt(4)
    assert torch.equal(base(x), expected)
