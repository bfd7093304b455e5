"""A projection of an input of which parts are dropped, beside the plain mathematics that it stands for."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from peftcore.layers import kernels


def seeded(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Drops the same in each call."""

    def repeatable(*args: Tensor) -> Tensor:
        torch.manual_seed(1)
        return run(*args, 0.25)

    return repeatable


@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
def test_a_dropped_projection_is_that_of_what_is_kept(leading: tuple[int, ...]) -> None:
    x, A = torch.randn(*leading, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    torch.manual_seed(1)
    mask, scale = kernels.dropout_mask(x, 0.25)
    assert mask.shape == x.shape and scale == 4 / 3
    torch.testing.assert_close(seeded(kernels.dropped_linear)(x, A), (x * mask * scale) @ A.T)


def test_gradients_of_a_dropped_projection() -> None:
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    A = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    run = seeded(kernels.dropped_linear)
    assert gradcheck(run, (x, A)) and gradgradcheck(run, (x, A))
    assert gradcheck(run, (x.detach(), A)) and gradcheck(run, (x, A.detach()))


BACKENDS = [
    "none",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
        ],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_dropout_drops(probability: float, backend: str) -> None:
    x = torch.ones(1000, 1001)
    dropout_mask = (
        kernels.dropout_mask
        if backend == "none"
        else torch.compile(kernels.dropout_mask, fullgraph=True, backend=backend)
    )
    mask, scale = dropout_mask(x, probability)
    assert abs(mask.double().mean() - (1 - probability)) < 5 * (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(mask.double().mean(0) - (1 - probability)).max() < 0.1
    assert abs(scale * (1 - probability) - 1) < 1e-4
    assert not torch.equal(mask, dropout_mask(x, probability)[0])
    rows = mask[:, :1000].double() - (1 - probability)
    assert abs((rows[:, :-1] * rows[:, 1:]).mean()) < 0.002  # neighbours come from the same random bits


def test_all_may_be_dropped() -> None:
    x, A = torch.ones(4, 8), torch.ones(2, 8)
    assert kernels.dropped_linear(x, A, 1.0).abs().max() == 0


def test_autocast_projects_in_its_dtype() -> None:
    x, A = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = kernels.dropped_linear(x, A, 0.5)
    assert low.dtype == torch.bfloat16
    low.sum().backward()
    assert x.grad is not None and A.grad is not None and A.grad.dtype == torch.float32
