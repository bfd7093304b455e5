"""VeRA's update and OFT's rotation are one function with a linear layer, wherever nothing else acts inside."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.layers.kinds import SMALL
from peftcore_reparameterized._kernels import projections, rotations, scaled_low_rank

X = torch.linspace(-1, 1, 4 * 8000).view(4, 2000, 4)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("vera", {}),
    "vera, dropout": ("vera", {"dropout": 0.25}),
    "oft": ("oft", {"block_size": 2}),
    "oft, shared": ("oft", {"block_size": 2, "block_share": True}),
    "oft, series": ("oft", {"block_size": 2, "series": 5}),
}
METHOD = pytest.mark.parametrize("name", METHODS)
KINDS = pytest.mark.parametrize(
    "kind", [nn.Linear, lambda inputs, outputs: Conv1D(outputs, inputs)], ids=["", "conv1d"]
)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outputs of the layers that were one function with what a method does there."""
    seen: list[int] = []

    def recording(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
            seen.append(len(weight))
            return kernel(x, weight, *args)

        return recorded

    for module, kernel in ((scaled_low_rank, "scaled_low_rank_linear"), (rotations, "rotated_linear")):
        monkeypatch.setattr(module, kernel, recording(getattr(module, kernel)))
    return seen


def stirred(model: nn.Module, name: str, **options: Any) -> peftcore.Injection:
    """An injection whose parameters have moved."""
    method, given = METHODS[name]
    injection = peftcore.apply(model, method, target=["0", "1"], **given, **options)
    for parameter in injection.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def linears(kind: Callable[[int, int], nn.Module] = nn.Linear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(4, 6), kind(6, 5))


@KINDS
@METHOD
def test_outputs_and_gradients_are_those_beside_the_layer(
    name: str, kind: Callable[[int, int], nn.Module], fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linears(kind).double()
    injection = stirred(model, name, dtype="float64")
    model.train()
    found = []
    for small in (SMALL, 10**9):
        monkeypatch.setattr("peftcore.layers.kinds.SMALL", small)
        torch.manual_seed(0)
        x = X.double().requires_grad_()
        output = model(x)
        found.append([output, *torch.autograd.grad(output.square().mean(), [x, *injection.parameters()])])
    assert fused == [6, 5]
    torch.testing.assert_close(*found)


@METHOD
def test_without_gradients_the_numbers_are_the_same_to_the_bit(name: str, fused: list[int]) -> None:
    """A checkpoint's first forward has no gradients, and its second has."""
    stirred(model := linears().train(), name)
    found = []
    for grad in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            found.append(model(X))
    assert fused == [6, 5] * 2 and torch.equal(*found)


@KINDS
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_vera_leaves_a_linear_layer_as_it_is_to_the_bit(
    training: bool, kind: Callable[[int, int], nn.Module], fused: list[int]
) -> None:
    model, x = nn.Sequential(kind(704, 512), nn.Linear(512, 704, bias=False)), torch.randn(2, 200, 704)
    with torch.no_grad():
        expected = model(x)
    peftcore.apply(model, "vera", target=["0", "1"])
    assert torch.equal(model.train(training)(x.requires_grad_()), expected)
    assert fused == [512, 704]


@METHOD
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_it_is_computed_again_in_backward(use_reentrant: bool, name: str, fused: list[int]) -> None:
    injection = stirred(model := linears().train(), name)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        output = run(x)
        output.square().mean().backward()
        found.append([output, x.grad, *[each.grad for each in injection.parameters()]])
    assert fused[:4] == [6, 5, 6, 5] and len(fused) == 6
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@METHOD
def test_a_layer_that_trains_gets_its_gradient(name: str, fused: list[int]) -> None:
    stirred(model := linears(), name)
    model[1].weight.requires_grad_(True)
    model(X).sum().backward()
    assert fused == [6] and model[1].weight.grad is not None


def test_an_input_of_another_dtype_is_refused_as_the_layer_itself_does(fused: list[int]) -> None:
    stirred(model := linears(), "vera")
    with pytest.raises(RuntimeError, match="dtype"):
        model(X.double().requires_grad_())
    assert fused == [6]


def test_what_is_around_something_else_calls_it(fused: list[int]) -> None:
    model = linears()
    peftcore.apply(model, "ia3", target=["0"])
    stirred(model, "vera")
    model(X).square().sum().backward()
    assert fused == [5]


class Pair(nn.Module):
    """Two layers that are given the same, as q and k are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return self.q(x), self.k(x)


def test_sites_of_one_input_share_what_is_the_same_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    injection = peftcore.apply(model := Pair(), "vera", target=["q", "k"])
    for parameter in injection.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    monkeypatch.setattr(projections._Project, "forward", project := Mock(wraps=projections._Project.forward))
    found = []
    for small in (SMALL, 10**9):
        monkeypatch.setattr("peftcore.layers.kinds.SMALL", small)
        x = X.clone().requires_grad_()
        q, k = model(x)
        found.append([q, k, *torch.autograd.grad(q.square().mean() + k.mean(), [x, *injection.parameters()])])
    assert project.call_count == 1
    torch.testing.assert_close(*found)
