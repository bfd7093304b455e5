"""Where a kernel's own gradient may not stand for the plain form: under transformations of torch.func."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peftcore.layers import kernels

EYE = torch.eye(10)

DROPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "projection": lambda x: kernels.dropped_linear(x, EYE, 0.25),
    "low-rank update": lambda x: kernels.low_rank_linear(x, torch.zeros(10, 10), None, EYE, EYE, 1.0, 0.25),
}
"""Of each, what comes out is what is kept of x."""


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("name", DROPPING)
def test_what_drops_under_vmap_and_grad(name: str, randomness: str) -> None:
    of_row = torch.func.grad(lambda x: DROPPING[name](x).sum())
    each = torch.func.vmap(of_row, randomness=randomness)(torch.ones(400, 10))
    assert set(each.unique().tolist()) == {0, torch.ones(1).div(0.75).item()}
    assert torch.equal(each, each[:1].expand_as(each)) == (randomness == "same")
    assert randomness == "same" or abs(each.mean() - 1) < 0.05
