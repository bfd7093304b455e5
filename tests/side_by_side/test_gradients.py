"""Gradients of peft and of peftcore, each beside finite differences of its own forward, in float64.

Where those of peft are wrong, the test says how wrong: the day peft changes, it fails. docs/moving-from-peft.md has the
figures.
"""

import itertools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftcore

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
STEP = 1e-5
"""How far a value is moved to either side: what is left of the error is about its square."""
EXACT = 1e-8


class Attention(nn.Module):
    """Self-attention by torch's module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return output


class Convolution(nn.Module):
    """A convolution with a kernel of 3 times 3."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


def loha(tucker: bool) -> tuple[Callable[[], nn.Module], tuple[int, ...], Any, dict[str, Any]]:
    return (
        Convolution,
        (2, 4, 5, 5),
        peft.LoHaConfig(r=2, alpha=4, target_modules=["layer"], use_effective_conv2d=tucker),
        {"method": "loha", "rank": 2, "alpha": 4.0, "target": "layer", "tucker": tucker},
    )


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any, dict[str, Any]]] = {
    "lora on attention": (
        Attention,
        (2, 5, 8),
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["layer"]),
        {"method": "lora", "rank": 2, "alpha": 4.0, "target": [nn.MultiheadAttention, "out_proj"]},
    ),
    "loha on a convolution": loha(False),
    "loha on a convolution, its kernel factored": loha(True),
}
WRONG = {
    "lora on attention": {"out_proj.lora_A": 0.5, "out_proj.lora_B": 0.5},
    "loha on a convolution": {},
    "loha on a convolution, its kernel factored": {"layer.hada_w1_a": 1.06, "layer.hada_w2_a": 3.82},
}
"""The errors of peft's gradients, by the ends of names; all others are right."""


def errors(model: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """The largest error of the gradient of each tensor that trains, relative to its largest entry."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    with torch.no_grad():
        for each in trained.values():
            each.copy_(0.5 * torch.randn(each.shape, generator=generator, dtype=torch.float64))
    direction = torch.randn(model(x).shape, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        return (direction * model(x)).sum()

    gradients = torch.autograd.grad(loss(), list(trained.values()))
    found = {}
    for (name, each), gradient in zip(trained.items(), gradients, strict=True):
        true = torch.zeros_like(gradient)
        with torch.no_grad():
            for index in itertools.product(*map(range, each.shape)):
                value, ends = each[index].item(), []
                for moved in (value + STEP, value - STEP):
                    each[index] = moved
                    ends.append(loss())
                each[index] = value
                true[index] = (ends[0] - ends[1]) / (2 * STEP)
        found[name] = float((gradient - true).abs().max() / true.abs().max())
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradients_beside_finite_differences(case: str) -> None:
    build, shape, config, options = CASES[case]
    torch.manual_seed(0)
    base = build().double()
    ours = deepcopy(base)
    peftcore.apply(ours, **options, dtype="float64")
    mine = errors(ours, shape)
    theirs = errors(peft.get_peft_model(deepcopy(base), config).double(), shape)
    assert len(mine) == len(theirs)
    assert max(mine.values()) < EXACT
    for name, error in theirs.items():
        name = name.removesuffix(".weight").removesuffix(".default")
        wrong = [each for end, each in WRONG[case].items() if name.endswith(end)]
        assert error == pytest.approx(wrong[0], abs=0.01) if wrong else error < EXACT, name
    assert sum(error > EXACT for error in theirs.values()) == len(WRONG[case])
