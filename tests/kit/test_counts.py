"""What the kit counts of a step is what a step takes."""

import pytest
import torch
from torch.nn import functional as F

from peftcore.testing.tools import Counts


@pytest.mark.parametrize("frozen", [False, True])
def test_a_grouped_convolution_takes_what_its_groups_take(frozen: bool) -> None:
    """Forward and backward; torch's own counter has the weight's gradient as often as there are groups."""

    def step(count: int) -> int:
        x = torch.randn(2, 4 * count, 7, 7, requires_grad=True)
        weight = torch.randn(6 * count, 4, 3, 3, requires_grad=not frozen)
        with Counts() as counts:
            F.conv2d(x, weight, groups=count).sum().backward()
        return counts.flops

    assert step(3) == 3 * step(1) > 0
