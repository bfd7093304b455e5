"""A linear layer with a low-rank update in one function, beside the plain mathematics that it stands for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from peftcore.layers import kernels


@pytest.fixture(params=["few columns", "many columns"])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the ranks of these tests are small ones."""
    monkeypatch.setattr("peftcore.layers.kernels.low_rank.FEW", 64 if request.param == "few columns" else 1)


Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def layer_and_factors(*leading: int) -> Factors:
    """x, weight, bias, A and B, of which the first and the last two want gradients."""
    made = [torch.randn(*shape, dtype=torch.float64) for shape in ((*leading, 5), (6, 5), (6,), (2, 5), (6, 2))]
    for wanted in (0, 3, 4):
        made[wanted].requires_grad_()
    return tuple(made)  # type: ignore[return-value]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
def test_a_linear_layer_with_a_low_rank_update(leading: tuple[int, ...], biased: bool) -> None:
    x, weight, bias, A, B = layer_and_factors(*leading)
    found = kernels.low_rank_linear(x, weight, bias if biased else None, A, B, 0.7)
    torch.testing.assert_close(found, x @ (weight + 0.7 * B @ A).T + (bias if biased else 0.0))


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_of_a_low_rank_update(dropout: float) -> None:
    x, weight, bias, A, B = layer_and_factors(2, 3)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(1)
        return kernels.low_rank_linear(x, weight, bias, A, B, 0.7, dropout)

    assert gradcheck(run, (x, A, B)) and gradgradcheck(run, (x, A, B))
    for mask in ((x.detach(), A, B), (x, A.detach(), B), (x, A, B.detach())):
        assert gradcheck(run, mask) and gradgradcheck(run, mask)


def test_a_low_rank_update_keeps_the_input_for_what_trains_alone() -> None:
    x, weight, bias, A, B = layer_and_factors(7)
    mask: list[torch.Size] = []

    def dropout_mask(tensor: Tensor) -> Tensor:
        mask.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(dropout_mask, lambda tensor: tensor):
        kernels.low_rank_linear(x, weight, bias, A.detach(), B, 0.7)
        assert x.shape not in mask and (7, 2) in mask
        mask.clear()
        kernels.low_rank_linear(x, weight, bias, A, B.detach(), 0.7)
        assert x.shape in mask and (7, 2) not in mask


def test_a_low_rank_update_drops_what_dropout_keeps_not() -> None:
    x, weight, bias, A, B = layer_and_factors(2, 3)
    torch.manual_seed(1)
    mask, scale = kernels.dropout_mask(x, 0.25)
    torch.manual_seed(1)
    found = kernels.low_rank_linear(x, weight, bias, A, B, 0.7, 0.25)
    torch.testing.assert_close(found, x @ weight.T + bias + 0.7 * (x * mask * scale) @ A.T @ B.T)
    assert torch.equal(kernels.low_rank_linear(x, weight, bias, A, B, 0.7, 1.0), F.linear(x, weight, bias))


def test_a_low_rank_update_under_vmap_and_grad() -> None:
    x, weight, bias, A, B = (each.detach() for each in layer_and_factors(7))

    def norm(A: Tensor, x: Tensor) -> Tensor:
        return kernels.low_rank_linear(x, weight, bias, A, B, 0.7).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(norm), in_dims=(None, 0))(A, x)
    torch.testing.assert_close(each.sum(0), torch.func.grad(norm)(A, x))


def test_a_low_rank_update_under_autocast() -> None:
    x, weight, bias, A, B = (each.detach().float() for each in layer_and_factors(2, 3))
    A.requires_grad_(), B.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.low_rank_linear(x, weight, bias, A, B, 0.7)
        plain = kernels.plain_low_rank_linear(x, weight, bias, A, B, 0.7)
    assert found.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0.02)
    assert {each.dtype for each in torch.autograd.grad(found.float().sum(), (A, B))} == {torch.float32}
