"""An update by fixed matrices between vectors, with the linear layer in one function, beside the plain mathematics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from peftcore.layers.kernels import dropout_mask
from peftcore_reparameterized import _kernels as kernels


@pytest.fixture(params=["few columns", "many columns"])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the ranks of these tests are small ones."""
    monkeypatch.setattr("peftcore.layers.kernels.low_rank.FEW", 64 if request.param == "few columns" else 1)


Scaled = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def layer_and_scaled_factors(*leading: int) -> Scaled:
    """x, weight, bias, A, inner, B and outer, of which the first and the vectors want gradients."""
    shapes = (*leading, 5), (6, 5), (6,), (2, 5), (6, 2)
    x, weight, bias, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    inner, outer = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (2, 6))
    return x.requires_grad_(), weight, bias, A, inner, B, outer


def _taking_each(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def taking_each(x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Any) -> Tensor:
        return kernel(x, weight, bias, kernels.ScaledFactors(*factors[:4]), *factors[4:])

    return taking_each


scaled_linear = _taking_each(kernels.scaled_low_rank_linear)
plain_scaled_linear = _taking_each(kernels.plain_scaled_low_rank_linear)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
def test_a_linear_layer_with_a_scaled_low_rank_update(leading: tuple[int, ...], biased: bool) -> None:
    x, weight, bias, *update = layer_and_scaled_factors(*leading)
    A, inner, B, outer = update
    expected = x @ (weight + outer.diag() @ B @ inner.diag() @ A).T + (bias if biased else 0.0)
    for run in (scaled_linear, plain_scaled_linear):
        torch.testing.assert_close(run(x, weight, bias if biased else None, A, inner, B, outer), expected)


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_of_a_scaled_low_rank_update(dropout: float) -> None:
    x, weight, bias, A, inner, B, outer = layer_and_scaled_factors(2, 3)

    def run(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        torch.manual_seed(1)
        return scaled_linear(x, weight, bias, A, inner, B, outer, dropout)

    assert gradcheck(run, (x, inner, outer)) and gradgradcheck(run, (x, inner, outer))
    for mask in ((x.detach(), inner, outer), (x, inner.detach(), outer), (x, inner, outer.detach())):
        assert gradcheck(run, mask) and gradgradcheck(run, mask)


def test_gradients_of_gradients_of_scales_alone() -> None:
    """The gradient of the scales alone is differentiated, so nothing comes back through the output itself."""
    x, *frozen, inner, B, outer = layer_and_scaled_factors(4)

    def of_scales(x: Tensor, inner: Tensor, outer: Tensor) -> tuple[Tensor, ...]:
        y = scaled_linear(x, *frozen, inner, B, outer)
        return torch.autograd.grad(y.sum(), (inner, outer), create_graph=True)

    assert gradcheck(of_scales, (x, inner, outer))


def test_a_scaled_low_rank_update_drops_what_dropout_keeps_not() -> None:
    x, weight, bias, A, inner, B, outer = layer_and_scaled_factors(2, 3)
    torch.manual_seed(1)
    mask, scale = dropout_mask(x, 0.25)
    torch.manual_seed(1)
    found = scaled_linear(x, weight, bias, A, inner, B, outer, 0.25)
    torch.testing.assert_close(found, x @ weight.T + bias + ((x * mask * scale) @ A.T * inner) @ B.T * outer)


def test_a_scaled_low_rank_update_of_matrices_that_train_is_the_plain_one() -> None:
    x, weight, bias, A, inner, B, outer = layer_and_scaled_factors(2, 3)
    A.requires_grad_(), B.requires_grad_()
    assert gradcheck(scaled_linear, (x, weight, bias, A, inner, B, outer))


def test_a_scaled_low_rank_update_under_vmap_and_grad() -> None:
    x, weight, bias, A, inner, B, outer = (each.detach() for each in layer_and_scaled_factors(7))

    def norm(inner: Tensor, x: Tensor) -> Tensor:
        return scaled_linear(x, weight, bias, A, inner, B, outer).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(norm), in_dims=(None, 0))(inner, x)
    torch.testing.assert_close(each.sum(0), torch.func.grad(norm)(inner, x))


def test_a_scaled_low_rank_update_under_autocast() -> None:
    x, weight, bias, A, inner, B, outer = (each.detach().float() for each in layer_and_scaled_factors(2, 3))
    inner.requires_grad_(), outer.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = scaled_linear(x, weight, bias, A, inner, B, outer)
    assert found.dtype == torch.bfloat16
    plain = plain_scaled_linear(x, weight, bias, A, inner, B, outer)
    torch.testing.assert_close(found.float(), plain, atol=0.1, rtol=0.05)
    assert {each.dtype for each in torch.autograd.grad(found.float().sum(), (inner, outer))} == {torch.float32}


def test_a_scaled_low_rank_update_drops_under_vmap_and_grad() -> None:
    eye, ones = torch.eye(10), torch.ones(10)

    def mask(x: Tensor) -> Tensor:
        return scaled_linear(x, torch.zeros(10, 10), None, eye, ones, eye, ones, 0.25).sum()

    for randomness in ("same", "different"):
        each = torch.func.vmap(torch.func.grad(mask), randomness=randomness)(torch.ones(400, 10))
        assert set(each.unique().tolist()) == {0, ones.div(0.75)[0].item()}
        assert torch.equal(each, each[:1].expand_as(each)) == (randomness == "same")
