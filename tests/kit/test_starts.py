"""What `same_start` tells apart."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peftcore.testing import CheckFailed, drawn, same_start

SIZE = 40_000


def normal(std: float = 0.02, mean: float = 0.0, size: int = SIZE) -> Tensor:
    return mean + std * torch.randn(size)


def uniform(std: float = 0.02, size: int = SIZE) -> Tensor:
    return std * 3**0.5 * (2 * torch.rand(size) - 1)


def cut(at: float = 2.0) -> Tensor:
    """A normal draw, cut at so many deviations."""
    return 0.02 * nn.init.trunc_normal_(torch.empty(SIZE), a=-at, b=at)


@pytest.mark.parametrize("draw", [normal, uniform, cut, lambda: normal(mean=1.0)])
def test_two_draws_of_one_distribution_are_the_same(draw: Callable[[], Tensor]) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        same_start(draw(), drawn(draw()))


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (uniform, normal, "kurtosis"),
        (normal, uniform, "kurtosis"),
        (cut, lambda: normal(cut().std().item()), "kurtosis"),
        (normal, lambda: cut(3.0), "outside|kurtosis"),
        (lambda: normal(0.022), normal, "std"),
        (lambda: normal(0.018), normal, "std"),
        (lambda: normal(mean=0.002), normal, "mean"),
        (lambda: torch.zeros(SIZE), normal, "everywhere"),
        (normal, lambda: torch.zeros(SIZE), r"as 0\.0"),
        (lambda: torch.ones(SIZE), lambda: torch.zeros(SIZE), r"as 0\.0"),
        (lambda: normal(size=2000), normal, "too few"),
        (normal, lambda: normal(size=2000), "too few"),
    ],
)
def test_others_are_told_apart(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], message: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        with pytest.raises(CheckFailed, match=message):
            same_start(ours(), drawn(theirs()))


def test_a_few_values_far_outside_are_seen() -> None:
    """By how many there are: mean, deviation and kurtosis know little of thirty that a uniform draw does not have."""
    torch.manual_seed(0)
    told, ours = drawn(uniform()), uniform()
    ours[:30] = told["max"] * 1.01
    with pytest.raises(CheckFailed, match="31 of 40000 numbers start outside"):
        same_start(ours, told)


def test_values_that_are_not_drawn_are_the_same_or_not() -> None:
    theirs = torch.linalg.svd(torch.arange(12.0).view(4, 3)).U
    same_start(theirs.double() + 1e-8, theirs.tolist())
    same_start(torch.full((3,), 0.1), drawn(torch.full((5,), 0.1)))
    with pytest.raises(CheckFailed, match="away from theirs"):
        same_start(theirs + 1e-4, theirs.tolist())
    with pytest.raises(CheckFailed, match=r"shape \[3, 4\]"):
        same_start(theirs[:3], theirs.tolist())
