"""Random numbers depend on (seed, path), and drawing them moves nothing else."""

import math
import threading
from collections.abc import Callable

import pytest
import torch
from core_toys import perceptron

import peftcore
from peftcore.surgery.seeding import one_dtype, preserved_rng, seed_by_path
from peftcore.testing.tools import default_dtype

DTYPES = (torch.bfloat16, torch.float64)


def drawn(seed: int, path: str) -> torch.Tensor:
    with preserved_rng():
        seed_by_path(seed, path)
        return torch.randn(4)


def test_numbers_depend_on_seed_and_path_alone() -> None:
    first = drawn(0, "layers.0.q_proj")
    torch.manual_seed(99)
    assert torch.equal(drawn(0, "layers.0.q_proj"), first)
    assert not torch.equal(drawn(1, "layers.0.q_proj"), first)
    assert not torch.equal(drawn(0, "layers.1.q_proj"), first)


def test_the_global_generator_stays_where_it_is() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    drawn(0, "anywhere")
    assert torch.equal(torch.randn(3), expected)


MAKERS: dict[str, Callable[[], torch.Tensor]] = {
    "empty": lambda: torch.empty(3).uniform_(-1, 1),
    "zeros": lambda: torch.zeros(3),
    "ones": lambda: torch.ones(3),
    "rand": lambda: torch.rand(3),
    "randn": lambda: torch.randn(2, 3),
    "eye": lambda: torch.eye(3),
    "linspace": lambda: torch.linspace(0, 1, 7),
    "logspace": lambda: torch.logspace(0, 1, 7),
    "full": lambda: torch.full((3,), 1 / 3),
    "arange": lambda: torch.arange(0, 1, 0.3),
    "tensor": lambda: torch.tensor([[1.0, 1 / 3], [2.0, 0.1]]),
    "as_tensor": lambda: torch.as_tensor(0.1),
    "scalar_tensor": lambda: torch.scalar_tensor(0.1),
    "linear": lambda: torch.nn.Linear(3, 4).weight.detach(),
    "kaiming": lambda: torch.nn.init.kaiming_uniform_(torch.empty(3, 4), a=math.sqrt(5)),
    "dtype=None": lambda: torch.randn(3, dtype=None),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_numbers_do_not_depend_on_the_default_dtype(make: Callable[[], torch.Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    expected = make()
    torch.manual_seed(0)
    with default_dtype(dtype), one_dtype():
        found = make()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_that_are_named_or_follow_from_values_stay(dtype: torch.dtype) -> None:
    with default_dtype(dtype), one_dtype():
        assert torch.rand(2, dtype=torch.float16).dtype == torch.float16
        assert torch.full((2,), 3).dtype == torch.arange(3).dtype == torch.tensor([1, 2]).dtype == torch.int64
        assert torch.full((2,), True).dtype == torch.tensor(False).dtype == torch.bool
        assert torch.zeros_like(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
        assert torch.as_tensor(torch.ones(2, dtype=torch.float16)).dtype == torch.float16
        assert torch.randperm(4).dtype == torch.int64
        assert torch.empty(2, device="meta").is_meta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_threads_keep_the_default_dtype(dtype: torch.dtype) -> None:
    found = []
    with default_dtype(dtype), one_dtype():
        thread = threading.Thread(target=lambda: found.extend([torch.zeros(2).dtype, torch.get_default_dtype()]))
        thread.start()
        thread.join()
    assert found == [dtype, dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planning_and_applying_are_in_float32(dtype: torch.dtype) -> None:
    model = perceptron()
    expected = peftcore.apply(perceptron(), "lora", target="first", seed=0).operators["first"]
    with default_dtype(dtype):
        assert set(peftcore.plan(model, "lora", target="first").dtypes.values()) == {torch.float32}
        operator = peftcore.apply(model, "lora", target="first", seed=0).operators["first"]
    assert operator.A.dtype == torch.float32
    assert torch.equal(operator.A, expected.A)
