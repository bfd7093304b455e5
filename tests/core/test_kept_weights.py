"""The effective weight in evaluation: built once, kept while nothing that it comes from changes."""

import pickle
from typing import Any

import pytest
import torch
from core_toys import Shift, ShiftOperator, perceptron
from torch import Tensor, nn

import peftcore
from peftcore.forward.slot import slot_of


def run_without_gradients(model: nn.Module, *inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(*inputs)


class Counting(ShiftOperator):
    """Counts how often the effective weight is built."""

    def forward(self, weight: Tensor) -> Tensor:
        self.count = getattr(self, "count", 0) + 1
        return super().forward(weight)


@pytest.fixture
def counted() -> tuple[nn.Module, peftcore.Injection, Counting]:
    model = perceptron()
    injection = peftcore.apply(model, Shift, target="first")
    operator = injection.operators["first"]
    operator.__class__ = Counting
    operator.count = 0
    return model, injection, operator  # type: ignore[return-value]


def built(counted: tuple[nn.Module, peftcore.Injection, Counting]) -> int:
    """How many times one evaluation builds the weight now."""
    model, _, operator = counted
    before = operator.count
    run_without_gradients(model, torch.ones(1, 4))
    return operator.count - before


def test_evaluation_builds_the_weight_once(counted: Any) -> None:
    assert [built(counted) for _ in range(4)] == [1, 0, 0, 0]


def test_kept_weight_follows_the_operator(counted: Any) -> None:
    model, _, operator = counted
    built(counted)
    first = run_without_gradients(model, torch.ones(1, 4))
    with torch.no_grad():
        operator.shift.add_(1)
    assert [built(counted), built(counted)] == [1, 0]
    assert not torch.equal(run_without_gradients(model, torch.ones(1, 4)), first)


def test_kept_weight_follows_the_base(counted: Any) -> None:
    model, _, _ = counted
    built(counted)
    with torch.no_grad():
        model.first.weight.mul_(2)
    assert [built(counted), built(counted)] == [1, 0]


def test_kept_weight_follows_a_state_dict_and_a_new_parameter(counted: Any) -> None:
    model, _, _ = counted
    built(counted)
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert built(counted) == 1
    model.first.weight = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
    assert built(counted) == 1


def test_kept_weight_follows_optimizer_steps(counted: Any) -> None:
    model, injection, _ = counted
    for fused in (False, True):
        optimizer = torch.optim.SGD(injection.parameters(), lr=0.1, fused=fused)
        before = run_without_gradients(model, torch.ones(1, 4))
        model.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert not torch.equal(run_without_gradients(model, torch.ones(1, 4)), before)


def test_forward_with_gradients_drops_what_is_kept(counted: Any) -> None:
    model, _, _ = counted
    built(counted)
    assert slot_of(model.first).cache
    model(torch.ones(1, 4))
    assert not slot_of(model.first).cache


def test_nothing_is_kept_in_training_mode(counted: Any) -> None:
    model, _, _ = counted
    model.train()
    assert [built(counted), built(counted)] == [1, 1]
    assert not slot_of(model.first).cache


def test_a_frugal_one_keeps_nothing(counted: Any) -> None:
    model, injection, _ = counted
    injection.low_memory = True
    assert [built(counted), built(counted)] == [1, 1]
    assert not slot_of(model.first).cache


def test_leaving_for_training_mode_frees_what_is_kept(counted: Any) -> None:
    """A long training phase must not hold a second copy of every weight from the evaluation before."""
    model, _, _ = counted
    built(counted)
    model.train()
    model(torch.ones(1, 4)).sum().backward()
    assert not slot_of(model.first).cache


def test_switching_injections_rebuilds(counted: Any) -> None:
    model, injection, _ = counted
    adapted = run_without_gradients(model, torch.ones(1, 4))
    with injection.disabled():
        bare = run_without_gradients(model, torch.ones(1, 4))
    assert not torch.equal(adapted, bare)
    assert torch.equal(run_without_gradients(model, torch.ones(1, 4)), adapted)


def test_kept_weights_are_not_pickled(counted: Any) -> None:
    model, injection, _ = counted
    injection.operators["first"].__class__ = ShiftOperator
    model(torch.ones(1, 4))  # the witness has seen enough and goes
    small = len(pickle.dumps(model))
    run_without_gradients(model, torch.ones(1, 4))
    assert slot_of(model.first).cache
    assert len(pickle.dumps(model)) == small
    assert not slot_of(pickle.loads(pickle.dumps(model)).first).cache


def test_inference_mode_and_no_grad_agree(counted: Any) -> None:
    model, _, _ = counted
    with torch.inference_mode():
        inference = model(torch.ones(1, 4)).clone()
    assert torch.equal(run_without_gradients(model, torch.ones(1, 4)), inference)
    model(torch.ones(1, 4)).sum().backward()  # nothing of inference mode is left in the graph


def test_effective_weight_is_not_saved_for_backward() -> None:
    """In training it is computed again: a step holds no copy of the weight from forward to backward."""
    model = nn.ModuleDict({"inner": nn.Linear(256, 256, bias=False)})
    peftcore.apply(model, "dora", target="inner", rank=1)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= 256 * 256 and tensor.data_ptr() != model["inner"].weight.data_ptr():
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model["inner"](torch.randn(2, 256, requires_grad=True))
        assert saved == []
    output.sum().backward()
