"""One product for all sites that are given one input and share a matrix."""

import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from peftcore_reparameterized import _kernels as kernels

Double = torch.float64


def inputs(*leading: int) -> tuple[Tensor, Tensor]:
    """What came of a computation ``[*leading, 5]``, and rows and columns of a larger matrix ``[3, 5]``."""
    torch.manual_seed(0)
    x = torch.randn(*leading, 5, dtype=Double, requires_grad=True) * 1.0
    return x, torch.randn(4, 6, dtype=Double)[:3, :5]


def projected(x: Tensor, A: Tensor) -> Tensor:
    return kernels.projected(x, A, x.dtype)


def test_a_projection_is_the_product() -> None:
    x, A = inputs(2, 7)
    torch.testing.assert_close(projected(x, A), x @ A.T)
    assert kernels.projected(x, A, torch.bfloat16).dtype == torch.bfloat16


def test_a_projection_of_no_rows() -> None:
    x, A = torch.empty(0, 2, 5, dtype=Double, requires_grad=True), inputs()[1]
    projected(x, A).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_what_is_projected_again_is_there() -> None:
    x, A = inputs(7)
    first = projected(x, A)
    assert projected(x, A[:3]) is first  # the same rows of the same matrix
    assert kernels.projected(x, A, torch.float32) is not first
    assert projected(x, A) is not first  # only the last one is known


def changed_input(x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    x.mul_(2)
    return x, A


def changed_matrix(x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    A.mul_(2)
    return x, A


CHANGES: list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = [
    changed_input,
    changed_matrix,
    lambda x, A: (x.clone(), A),
    lambda x, A: (x, A.clone()),
    lambda x, A: (x, A[:2]),
    lambda x, A: (x.detach(), A),
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_product_is_made(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    x, A = inputs(7)
    first = projected(x, A)
    x, A = change(x, A)
    found = projected(x, A)
    assert found is not first
    torch.testing.assert_close(found, x @ A.T)


def test_an_input_that_nothing_computed_is_projected_each_time() -> None:
    """Its owner may write to it unseen."""
    x, A = inputs(7)
    x = x.detach().requires_grad_()
    first = projected(x, A)
    x.data.mul_(2)
    torch.testing.assert_close(projected(x, A), 2 * first)


def test_what_is_made_without_gradients_is_not_found_with_them() -> None:
    x, A = inputs(7)
    with torch.no_grad():
        before = projected(x, A)
    assert not before.requires_grad and projected(x, A).requires_grad
    with torch.no_grad():
        assert not projected(x, A).requires_grad


def test_a_matrix_that_trains_gets_its_gradient() -> None:
    x, A = inputs(7)
    A = A.clone().requires_grad_()
    [of_A] = torch.autograd.grad(projected(x, A).sum() + 2 * projected(x, A).sum(), A)
    torch.testing.assert_close(of_A, 3 * x.sum(0).expand(3, 5))


def test_nothing_is_kept_alive() -> None:
    x, A = inputs(7)
    first = projected(x, A)
    known = [weakref.ref(each) for each in (x, A, first)]
    del x, A, first
    assert [each() for each in known] == [None, None, None]


def test_another_thread_makes_its_own() -> None:
    x, A = inputs(7)
    first, found = projected(x, A), []
    thread = threading.Thread(target=lambda: found.append(projected(x, A)))
    thread.start()
    thread.join()
    assert found[0] is not first


# with the layers whose update it is


def sites(count: int) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Layers with updates by one matrix, as functions of what they are given and that matrix."""

    def site() -> Callable[[Tensor, Tensor], Tensor]:
        weight, B = torch.randn(4, 5, dtype=Double), torch.randn(4, 3, dtype=Double)
        inner, outer = torch.randn(3, dtype=Double), torch.randn(4, dtype=Double)

        def run(x: Tensor, A: Tensor) -> Tensor:
            return kernels.scaled_low_rank_linear(x, weight, None, kernels.ScaledFactors(A, inner, B, outer))

        return run

    return [site() for _ in range(count)]


def test_layers_of_one_input_share_the_product_and_its_gradient() -> None:
    x, A = inputs(7)
    one, two = sites(2)
    made: list[Tensor] = []

    def count(gradient: Tensor) -> None:
        made.append(gradient)

    y = one(x, A)
    projected(x, A).register_hook(count)  # what the first one made
    (y.sum() + two(x, A).sum()).backward()
    assert len(made) == 1  # of both, in one


def test_gradients_of_layers_that_share() -> None:
    x, A = inputs(2, 3)
    one, two = sites(2)

    def run(x: Tensor) -> Tensor:
        x = x * 1.0
        return one(x, A) * two(x, A)

    leaf = x.detach().requires_grad_()
    assert gradcheck(run, leaf) and gradgradcheck(run, leaf)


def test_layers_that_share_are_differentiated_one_after_the_other() -> None:
    three, (_, A) = sites(3), inputs(7)
    leaf = torch.randn(7, 5, dtype=Double, requires_grad=True)
    x = leaf + 1.0  # a sum keeps nothing, so it is differentiated as often as one likes
    for output in [site(x, A) for site in three]:
        output.sum().backward()
    apart = sum(torch.autograd.grad(site(leaf, A).sum(), leaf)[0] for site in three)
    torch.testing.assert_close(leaf.grad, apart)


@pytest.mark.parametrize("apart", [True, False])
def test_checkpoints_repeat_what_was_shared(apart: bool) -> None:
    """Also where the first forward found a product that the second one has to make."""
    x, A = inputs(7)
    three = sites(3)
    repeated = partial(checkpoint, use_reentrant=False)

    def all_of_them(x: Tensor) -> Tensor:
        if apart:
            return sum((repeated(site, x, A) for site in three), torch.zeros(()))
        return repeated(lambda x: sum((site(x, A) for site in three), torch.zeros(())), x)

    [found] = torch.autograd.grad(all_of_them(x).pow(2).sum(), x, retain_graph=True)
    plain = sum((site(x, A) for site in three), torch.zeros(()))
    torch.testing.assert_close(found, torch.autograd.grad(plain.pow(2).sum(), x)[0])


def test_a_checkpoint_makes_again_what_is_gone() -> None:
    """Its first forward found the product, and its second one does not: both keep the same number of tensors."""
    (one, two), (_, A) = sites(2), inputs(7)
    leaf = torch.randn(7, 5, dtype=Double, requires_grad=True)
    x = leaf + 1.0
    first, second = one(x, A), checkpoint(two, x, A, use_reentrant=False)
    first.sum().backward()
    leaf.grad = None
    second.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(two(leaf, A).sum(), leaf)[0])


def test_what_is_saved_elsewhere() -> None:
    x, A = inputs(7)
    one, two = sites(2)
    with torch.autograd.graph.save_on_cpu():
        y = one(x, A) + two(x, A)
    [found] = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad((one(x.clone(), A) + two(x.clone(), A)).sum(), x)[0])


def test_under_vmap_and_grad() -> None:
    x, A = (each.detach() for each in inputs(7))

    def norm(x: Tensor) -> Tensor:
        return projected(x, A).pow(2).sum()

    torch.testing.assert_close(torch.func.vmap(torch.func.grad(norm))(x), torch.func.grad(norm)(x))
