"""A block of `cache_weights`: for a model or a part of it, inside another block, for one thread, while it lasts."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from core_toys import Shift, ShiftOperator, perceptron, run_without_gradients
from torch import Tensor, nn

import peftcore
from peftcore import cache_weights


class Counting(ShiftOperator):
    """Counts how often the effective weight is built."""

    count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return super().forward(weight)


@pytest.fixture
def counted() -> tuple[nn.Module, Counting]:
    model = perceptron()
    operator: Any = peftcore.apply(model, Shift, target="first").operators["first"]
    operator.__class__ = Counting
    return model, operator


def built(counted: tuple[nn.Module, Counting]) -> int:
    """How many times one evaluation builds the weight now."""
    model, operator = counted
    before = operator.count
    run_without_gradients(model, torch.ones(1, 4))
    return operator.count - before


def test_a_block_of_a_part_and_one_inside_another(counted: Any) -> None:
    model = counted[0]
    with cache_weights(model.first):
        assert [built(counted), built(counted)] == [1, 0]
        with cache_weights(model):
            assert built(counted) == 0
        assert built(counted) == 0


def test_a_block_holds_for_its_thread_and_for_tasks_as_long_as_it_lasts(counted: Any) -> None:
    model = counted[0]

    async def later(begin: asyncio.Event) -> int:
        await begin.wait()
        return built(counted) + built(counted)

    async def main() -> tuple[int, int]:
        begin = asyncio.Event()
        with cache_weights(model):
            built(counted)
            task = asyncio.ensure_future(later(begin))
            with ThreadPoolExecutor(1) as pool:
                apart = pool.submit(lambda: built(counted) + built(counted)).result()
        begin.set()
        return apart, await task

    assert asyncio.run(main()) == (2, 2)


def test_a_model_that_is_not_adapted_has_nothing_to_keep() -> None:
    with cache_weights(perceptron()):
        pass
