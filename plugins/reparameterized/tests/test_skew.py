"""Rotations of skew-symmetric matrices beside the plain mathematics."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from peftcore_reparameterized import _kernels as kernels
from peftcore_reparameterized._kernels import skew

ROTATIONS: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "cayley": (kernels.cayley, kernels.plain_cayley),
    **{
        f"neumann {terms}": (partial(kernels.neumann, terms=terms), partial(kernels.plain_neumann, terms=terms))
        for terms in (4, 5, 6, 7, 9, 12)
    },
}
BATCH = pytest.mark.parametrize("batch", [(), (3,), (2, 3)])


def entries_of(*batch: int, size: int) -> Tensor:
    """What stands above the diagonals of skew-symmetric matrices."""
    return torch.randn(*batch, size * (size - 1) // 2, dtype=torch.float64)


@BATCH
def test_skew_symmetric_matrices_from_their_entries(batch: tuple[int, ...]) -> None:
    entries = entries_of(*batch, size=4)
    K = kernels.plain_skew(entries, 4)
    assert torch.equal(K, -K.mT) and torch.equal(K[..., 1, 2:], entries[..., 3:5])
    assert torch.equal(K, skew._skew(entries, 4))


@BATCH
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_and_their_gradients(name: str, batch: tuple[int, ...]) -> None:
    kernel, plain = (partial(each, size=4) for each in ROTATIONS[name])
    entries = entries_of(*batch, size=4).requires_grad_()
    torch.testing.assert_close(kernel(entries), plain(entries))
    weights = torch.randn(*batch, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        *(torch.autograd.grad((each(entries) * weights).sum(), entries) for each in (kernel, plain))
    )
    assert gradcheck(kernel, entries) and gradgradcheck(kernel, entries)


@pytest.mark.parametrize("name", ROTATIONS)
def test_backward_of_rotations_keeps_two_matrices_at_most(name: str) -> None:
    entries, kept = entries_of(3, size=4).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: entries):
        ROTATIONS[name][0](entries, 4)
    matrix = torch.Size([3, 4, 4])
    assert kept == ([matrix] if name == "cayley" else [entries.shape, matrix, matrix])


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_under_vmap_and_grad(name: str) -> None:
    kernel, plain = (partial(each, size=3) for each in ROTATIONS[name])
    entries = entries_of(5, 2, size=3)
    each = torch.func.vmap(torch.func.grad(lambda one: kernel(one).pow(3).sum()))(entries)
    for one, gradient in zip(entries.requires_grad_(), each, strict=True):
        torch.testing.assert_close(torch.autograd.grad(plain(one).pow(3).sum(), one)[0], gradient)


def test_what_a_transform_or_inference_makes_is_not_kept() -> None:
    entries = entries_of(2, size=23)  # of a size that nothing else here has
    torch.func.vmap(torch.func.grad(lambda one: kernels.neumann(one, 23, 5).pow(2).sum()))(entries)
    with torch.inference_mode():
        kernels.neumann(entries, 23, 5)
    assert not [key for key in skew._KEPT if 23 in key]
    kernels.neumann(entries, 23, 5)
    assert [key for key in skew._KEPT if 23 in key]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether matrices were so small that their transform is a product."""
    seen: list[bool] = []
    ask = skew._is_small

    def asking(K: Tensor) -> bool:
        seen.append(ask(K))
        return seen[-1]

    monkeypatch.setattr(skew, "_is_small", asking)
    return seen


def with_norm(entries: Tensor, norm: float) -> Tensor:
    """Entries of matrices that have this norm."""
    return entries * (norm / math.sqrt(2)) / torch.linalg.vector_norm(entries, dim=-1, keepdim=True)


@pytest.mark.parametrize("dtype", skew.SMALL)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.999])
@pytest.mark.parametrize("planes", ["all", "one"])
@pytest.mark.parametrize(("batch", "size"), [((), 16), ((3,), 32), ((2, 3), 17)])
def test_small_matrices_are_not_solved_for(
    batch: tuple[int, ...], size: int, planes: str, share: float, dtype: torch.dtype, asked: list[bool]
) -> None:
    entries = entries_of(*batch, size=size)
    if planes == "one":  # in which it does all that its norm allows
        entries[..., 1:] = 0
    entries = with_norm(entries, skew.SMALL[dtype] * share).to(dtype).requires_grad_()
    found = kernels.cayley(entries, size)
    assert asked == [True] and found.dtype == dtype
    expected = kernels.plain_cayley(precise := entries.detach().double().requires_grad_(), size)
    few = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, atol=few, rtol=0)
    torch.testing.assert_close((found @ found.mT).double(), torch.eye(size).double().expand_as(found), atol=few, rtol=0)
    gradient = torch.randn_like(expected)
    (one,), (other,) = (
        torch.autograd.grad(R, each, gradient.to(R.dtype)) for R, each in ((found, entries), (expected, precise))
    )
    torch.testing.assert_close(one, other.to(dtype), atol=100 * few, rtol=0)


def test_larger_narrower_and_broken_matrices_are_solved_for(asked: list[bool]) -> None:
    small = with_norm(entries_of(3, size=16), skew.SMALL[torch.float64] * 0.9)
    one_is_large, one_is_broken = small.clone(), small.clone()
    one_is_large[1] *= 1.2
    one_is_broken[1, 0] = float("nan")
    for entries, size in ((one_is_large, 16), (one_is_broken, 16), (small[:, : 15 * 7], 15), (small[:0], 16)):
        kernels.cayley(entries, size)
    assert not any(asked)
    kernels.cayley(small, 16)
    assert asked[-1]


def test_a_longer_series_comes_nearer_to_the_rotation() -> None:
    entries = entries_of(3, size=4) / 20
    off = [(kernels.neumann(entries, 4, terms) - kernels.cayley(entries, 4)).abs().max() for terms in (4, 5, 9)]
    assert off[0] > off[1] > off[2] and off[2] < 1e-4
