"""Rotations in blocks, of rows and of the inputs of a linear layer, beside the plain mathematics."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from peftcore_reparameterized import _kernels as kernels
from peftcore_reparameterized._kernels import rotations

SHAPES = [(6, 3, 2), (5, 1, 4), (1, 3, 2)]
"""Rows, blocks, size."""


def blocks(rows: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, count * size, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(count, size, size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_is_a_product_with_a_block_diagonal_matrix(shape: tuple[int, int, int]) -> None:
    x, R = blocks(*shape)
    expected, before = x @ torch.block_diag(*R), x.clone()
    torch.testing.assert_close(kernels.rotate(x, R), expected)
    torch.testing.assert_close(kernels.plain_rotate(x, R), expected)
    with torch.no_grad():
        torch.testing.assert_close(rotations._where_they_lie(x, R).view(x.shape), expected)  # of other devices
    torch.testing.assert_close(x, before, atol=0, rtol=0)


def test_rotation_of_rows_in_several_dimensions_that_lie_anyhow() -> None:
    _, R = blocks(6, 3, 2)
    apart = torch.randn(2, 6, 3, dtype=torch.float64).mT.requires_grad_()  # [2, 3, 6], not contiguous
    torch.testing.assert_close(kernels.rotate(apart, R), apart @ torch.block_diag(*R))
    assert gradcheck(kernels.rotate, (apart, R)) and gradgradcheck(kernels.rotate, (apart, R))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_rotation(shape: tuple[int, int, int]) -> None:
    assert gradcheck(kernels.rotate, blocks(*shape))
    assert gradgradcheck(kernels.rotate, blocks(*shape))
    x, R = blocks(*shape)
    assert gradcheck(kernels.rotate, (x.detach(), R)) and gradcheck(kernels.rotate, (x, R.detach()))


def test_what_goes_into_a_rotation_and_back_stays() -> None:
    given = [*blocks(6, 3, 2), torch.randn(6, 6, dtype=torch.float64)]
    x, R, gradient = given
    before = [each.detach().clone() for each in given]
    torch.autograd.grad(kernels.rotate(x, R), (x, R), gradient)
    assert all(map(torch.equal, given, before))


def test_rotation_under_vmap_and_grad() -> None:
    x, R = (each.detach() for each in blocks(6, 3, 2))

    def norm(R: Tensor, row: Tensor) -> Tensor:
        return kernels.rotate(row.unsqueeze(0), R).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(norm), in_dims=(None, 0))(R, x)
    whole = torch.func.grad(lambda R: kernels.rotate(x, R).pow(2).sum())(R)
    torch.testing.assert_close(each.sum(0), whole)


Turned = tuple[Tensor, Tensor, Tensor, Tensor]


def layer_and_rotation(*leading: int, count: int = 3, exact: bool = True) -> Turned:
    """x, weight, bias and blocks of two, of rotations if exact; the first and the last want gradients."""
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((*leading, 6), (4, 6), (4,)))
    R = torch.randn(count, 2, 2, dtype=torch.float64)
    R = kernels.plain_cayley(R[:, :1, 1], 2) if exact else R
    return x.requires_grad_(), weight, bias, R.requires_grad_()


LEADING = pytest.mark.parametrize(("leading", "count"), [((9,), 3), ((2, 4), 3), ((5,), 3), ((), 3), ((9,), 1)])
"""As many rows as turn the weight there and back, or there alone, or nothing but themselves."""
EXACT = pytest.mark.parametrize("exact", [True, False])


@EXACT
@pytest.mark.parametrize("biased", [True, False])
@LEADING
def test_a_linear_layer_of_turned_inputs(leading: tuple[int, ...], count: int, biased: bool, exact: bool) -> None:
    x, weight, bias, R = layer_and_rotation(*leading, count=count, exact=exact)
    kept = [each.detach().clone() for each in (x, weight)]
    found = kernels.rotated_linear(x, weight, bias if biased else None, R, exact)
    expected = x @ torch.block_diag(*R.expand(3, 2, 2)) @ weight.T + (bias if biased else 0.0)
    torch.testing.assert_close(found, expected)
    plain = kernels.plain_rotated_linear(x, weight, bias if biased else None, R)
    torch.testing.assert_close(plain, expected)
    gradient = torch.randn_like(found)
    given = gradient.clone()
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, R), gradient), torch.autograd.grad(plain, (x, R), gradient)
    )
    assert torch.equal(gradient, given) and all(map(torch.equal, (x, weight), kept))


@EXACT
@LEADING
def test_gradients_of_a_linear_layer_of_turned_inputs(leading: tuple[int, ...], count: int, exact: bool) -> None:
    x, weight, bias, R = layer_and_rotation(*leading, count=count, exact=exact)

    def run(x: Tensor, R: Tensor) -> Tensor:
        return kernels.rotated_linear(x, weight, bias, R, exact)

    for given in ((x, R), (x.detach(), R), (x, R.detach())):
        assert gradcheck(run, given) and gradgradcheck(run, given)


def test_gradients_of_gradients_of_turned_inputs_hold_beside_rotations_too() -> None:
    x, weight, bias, R = layer_and_rotation(9)
    found = []
    for kernel in (kernels.rotated_linear, kernels.plain_rotated_linear):
        first = torch.autograd.grad(kernel(x, weight, bias, R).square().sum(), (x, R), create_graph=True)
        found.append(torch.autograd.grad(sum(each.sin().sum() for each in first), (x, R)))
    torch.testing.assert_close(*found)


def test_a_linear_layer_of_turned_inputs_under_vmap_and_grad() -> None:
    x, weight, bias, R = (each.detach() for each in layer_and_rotation(7))

    def norm(R: Tensor, x: Tensor) -> Tensor:
        return kernels.rotated_linear(x, weight, bias, R).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(norm), in_dims=(None, 0))(R, x)
    torch.testing.assert_close(each.sum(0), torch.func.grad(norm)(R, x))


def test_a_linear_layer_of_turned_inputs_under_autocast() -> None:
    x, weight, bias, R = (each.detach().float() for each in layer_and_rotation(2, 3))
    R.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.rotated_linear(x, weight, bias, R)
        plain = kernels.plain_rotated_linear(x, weight, bias, R)
    assert found.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0.02)
    assert torch.autograd.grad(found.float().sum(), R)[0].dtype == torch.float32
