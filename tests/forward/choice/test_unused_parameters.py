"""Under DistributedDataParallel an adapter that trains and does not act is refused before the first step."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from core_toys import perceptron
from process_groups import process_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import peftcore
from peftcore.errors import TrainingError

X = torch.ones(2, 4)


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with process_group(store=dist.HashStore(), rank=0, world_size=1):
        yield


def adapted() -> tuple[nn.Module, peftcore.Injection, peftcore.Injection]:
    model = perceptron()
    one, two = (peftcore.apply(model, "lora", name=name, target="first") for name in ("one", "two"))
    return model, one, two


def steps(runner: nn.Module) -> None:
    for _ in range(2):
        runner(X).sum().backward()


def test_what_trains_and_does_not_act_is_named_before_the_first_step() -> None:
    model, one, _ = adapted()
    peftcore.activate(model, "one")
    runner = DistributedDataParallel(model)
    with pytest.raises(TrainingError, match=r"'two' trains but is not active.*trainable\(False\)"):
        runner(X)
    assert all(parameter.grad is None for parameter in one.parameters())
    with torch.no_grad():
        runner(X)
    with runner.no_sync():
        runner(X)
    steps(model)  # by itself it waits for nothing


@pytest.mark.parametrize("way", ["both act", "frozen", "merged and frozen", "find", "static"])
def test_what_it_says_helps(way: str) -> None:
    model, one, two = adapted()
    if way != "both act":
        peftcore.activate(model, "one")
    if "frozen" in way:
        two.trainable(False)
    if "merged" in way:
        one.trainable(False), two.trainable(True)
        peftcore.activate(model, "one", "two")
        one.merge()
    steps(DistributedDataParallel(model, find_unused_parameters=way == "find", static_graph=way == "static"))
    trained = two if way == "merged and frozen" else one
    assert all(parameter.grad is not None for parameter in trained.parameters())


def test_an_adapter_that_was_loaded_to_wait_is_frozen(tmp_path: object) -> None:
    model, one, two = adapted()
    two.save(f"{tmp_path}/two")
    two.remove()
    peftcore.load(model, f"{tmp_path}/two", name="two", active=False)
    steps(DistributedDataParallel(model))
    assert all(parameter.grad is not None for parameter in one.parameters())


def test_a_model_that_another_runs_along_is_none_of_its_business() -> None:
    model, _, _ = adapted()
    peftcore.activate(model, "one")

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(x).sum() + model(x).sum()

    runner = DistributedDataParallel(Student())
    for _ in range(2):
        runner(X).backward()


def test_gradients_of_a_forward_come_after_the_next_choice() -> None:
    """So choosing must not freeze: autograd drops gradients of what is frozen when they come, without a word."""
    model, one, two = adapted()
    peftcore.activate(model, "one")
    output = model(X)
    peftcore.activate(model, "two")
    assert all(parameter.requires_grad for each in (one, two) for parameter in each.parameters())
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in one.parameters())
