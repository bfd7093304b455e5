"""The low-rank adapter, a preset of Compacter: numbers of OpenDelta, its size, and what goes with it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import against, frozen
from peftcore.testing.hosts import HOSTS

NUMBERS = Path(__file__).parent / "numbers" / "low_rank_adapter.json"


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


@against(
    "OpenDelta 0.3.2",
    "compacter",
    repository="thunlp/OpenDelta",
    commit="20e426f",
    script="opendelta/delta_models/low_rank_adapter.py",
)
def test_the_numbers_of_opendelta() -> None:
    numbers = frozen(NUMBERS)
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).double().requires_grad_(False)
    model[0].weight.copy_(torch.eye(8))
    injection = peftcore.apply(model, "low_rank_adapter", target="0", bottleneck=4, dtype="float64")
    parts = [injection.operators["0"].down, injection.operators["0"].up]
    own = [tensor for part in parts for tensor in (part.left, part.right, part.bias)]
    with torch.no_grad():
        for index, tensor in enumerate(own):
            tensor.copy_(wave(tensor, 1 + 0.3 * index))
    x = wave(torch.empty(2, 8), 0.4).requires_grad_()
    y = model(x)
    (y.square() * wave(y, 0.3)).sum().backward()
    assert y.flatten().tolist() == pytest.approx(numbers["output"], abs=1e-10)
    assert x.grad.flatten().tolist() == pytest.approx(numbers["input"], abs=1e-10)
    assert len(list(injection.parameters())) == len(own) == len(numbers["gradients"])
    for tensor, (name, gradient) in zip(own, numbers["gradients"].items(), strict=True):
        assert tensor.grad.any()
        assert tensor.grad.flatten().tolist() == pytest.approx(gradient, abs=1e-10), name


@pytest.mark.parametrize("rank", [1, 3])
def test_it_has_no_rules(rank: int) -> None:
    """2 q (d + r) + r + d an adapter; of a rank above 1 a product of matrices, where OpenDelta's own breaks."""
    model, inputs = HOSTS["llama"].build()
    options = {"bottleneck": 6, "rank": rank, "train_layer_norm": False}
    assert peftcore.plan(model, "low_rank_adapter", **options).trainable == 4 * (2 * rank * (16 + 6) + 6 + 16)
    injection = peftcore.apply(model, "low_rank_adapter", **options)
    assert sum(p.numel() for p in injection.parameters()) == 4 * (2 * rank * (16 + 6) + 6 + 16)
    assert not injection.shared
    model(**inputs)


def test_several_products_have_rules() -> None:
    with pytest.raises(ConfigError, match="set phm_dim=1 with it"):
        peftcore.apply(HOSTS["llama"].build()[0], "compacter", rules=False)
