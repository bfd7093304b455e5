"""PEANuT beside peft's and beside its equation, column by column."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation
from peft_pairs import ADAPTER, Both, Pair
from torch import Tensor, nn
from two_layers import Two

from peftcore.testing import against, conformance


# On the UNet three steps of a small update move the middle matrix of some queries by less than float32 has.
@conformance("peanut", options={"*": {"rank": 4, "depth": 1}, "unet": {"rank": 4, "depth": 1, "scale": 50.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@conformance("peanut", hosts=["llama"], options={"llama": {"rank": 4}})
def test_conformance_of_the_default_depth(check: Callable[[], None]) -> None:
    check()


def network(depth: int) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    def answered(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        columns = []
        for column in weight.flatten(1).T:
            h = [torch.tanh(tensors["A"] @ column)]
            for i in range(depth):
                h.append(torch.tanh(tensors["E"][i] @ h[-1]))
            for i in range(depth):
                h.append(torch.tanh(tensors["D"][i] @ h[-1]) + h[depth - 1 - i])
            columns.append(column + 1.5 * tensors["B"] @ h[-1])
        return torch.stack(columns, 1).view(weight.shape)

    return answered


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str, depth: int) -> None:
    assert_equation(kind, "peanut", network(depth), rank=3, depth=depth, activation="tanh", scale=1.5)


def test_start() -> None:
    operator = adapted("linear", "peanut", rank=16, depth=2)[2]
    assert not operator.B.any()
    assert operator.A.abs().max() <= 7**-0.5 and operator.A.std() > 0.5 * 7**-0.5
    for layers in (operator.E, operator.D):
        assert layers.shape == (2, 16, 16) and 0.24 < layers.abs().max() <= 0.25
    assert [name for name, _ in adapted("linear", "peanut")[2].named_parameters()] == ["A", "B"]


def two() -> Two:
    """Two linear layers."""
    return Two(nn.Linear(12, 7), nn.Linear(7, 9))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.A", operator.A, layer.peanut_A[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.B", operator.B, layer.peanut_B[ADAPTER].weight, lambda t: t)


@pytest.mark.parametrize("act", ["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"])
@against("peft 0.21", "peanut")
def test_beside_peft(act: str) -> None:
    torch.manual_seed(0)
    config = peft.PeanutConfig(r=4, act_fn=act, scaling=5.0, target_modules=["first", "second"])
    options = {"target": ["first", "second"], "rank": 4, "activation": act, "scale": 5.0, "dtype": "float64"}
    both = Both(two().double(), "peanut", options, config, pairs)
    ours = sum(p.numel() for p in both.injection.parameters())
    assert ours == sum(p.numel() for p in both.tuner.parameters() if p.requires_grad) == 2 * 4 * (7 + 9)
    x = torch.randn(2, 3, 12).double()
    for model in (both.ours, both.tuner):
        model.train()
    both.assert_same(lambda model: model(x))
