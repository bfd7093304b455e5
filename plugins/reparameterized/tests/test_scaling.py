"""What is scaled entry by entry, beside the plain mathematics."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from peftcore_reparameterized import _kernels as kernels


@pytest.mark.parametrize("shapes", [((2, 3, 4), (4,), (2, 3, 4)), ((2, 3, 4), (3, 1), (2, 3, 4)), ((4,), (4,), (2, 4))])
def test_a_sum_with_something_scaled(shapes: tuple[tuple[int, ...], ...]) -> None:
    y, gain, z = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    torch.testing.assert_close(kernels.add_scaled(y, gain, z), kernels.plain_add_scaled(y, gain, z))
    assert gradcheck(kernels.add_scaled, (y, gain, z)) and gradgradcheck(kernels.add_scaled, (y, gain, z))
    assert gradcheck(kernels.add_scaled, (y, gain.detach(), z)) and gradcheck(kernels.add_scaled, (y, gain, z.detach()))


def test_a_sum_with_something_scaled_under_vmap_and_grad() -> None:
    y, gain, z = (torch.randn(*shape, dtype=torch.float64) for shape in ((4,), (4,), (3, 4)))
    each = torch.func.vmap(torch.func.grad(lambda z: kernels.add_scaled(y, gain, z).sum()))(z)
    torch.testing.assert_close(each, gain.expand(3, 4))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_scaled_bases(batch: tuple[int, ...]) -> None:
    A = torch.randn(2, 5, dtype=torch.float64)
    L, G = (torch.randn(*batch, *shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (3, 5)))
    expected = torch.einsum("ri,...rb,...bi->...rbi", A, L, G)
    torch.testing.assert_close(kernels.scaled_bases(A, L, G), expected)
    torch.testing.assert_close(kernels.plain_scaled_bases(A, L, G), expected)
    run = partial(kernels.scaled_bases, A)
    assert gradcheck(run, (L, G)) and gradgradcheck(run, (L, G))
    assert gradcheck(kernels.scaled_bases, (A.requires_grad_(), L, G))


def test_scaled_bases_under_vmap_and_grad() -> None:
    A, L, G = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5), (4, 2, 3), (4, 3, 5)))
    each = torch.func.vmap(torch.func.grad(lambda L, G: kernels.scaled_bases(A, L, G).pow(2).sum()))(L, G)
    together = torch.func.grad(lambda L: kernels.scaled_bases(A, L, G).pow(2).sum())(L)
    torch.testing.assert_close(each, together)
