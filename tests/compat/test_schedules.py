"""A schedule that nobody tells of the optimizer's steps is refused, whichever optimizer took them."""

from typing import Any

import pytest
import torch
from training_hosts import host

import peftcore
from peftcore.errors import TrainingError
from peftcore.training.optimizer import scheduled, take_steps

pytest.importorskip("peft")
compat = pytest.importorskip("peftcore.compat")

IDS = torch.arange(3, 15).reshape(2, 6)
OPTIONS = {"rank": 4, "target_rank": 1, "warmup": 1, "final": 1, "interval": 1}


def model() -> Any:
    return compat.get_peft_model(host("llama"), "adalora", **OPTIONS).train()


def backward(ours: Any) -> None:
    ours(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_a_step_that_it_was_not_told_of_is_refused(options: dict[str, bool]) -> None:
    ours = model()
    optimizer = torch.optim.AdamW(ours.adapters["default"].parameters(), lr=1e-3, **options)
    for _ in range(2):  # gradients add up: that is no step
        backward(ours)
    ours.eval()(input_ids=IDS)
    optimizer.step()
    ours(input_ids=IDS)  # evaluation is none of its business
    with pytest.raises(TrainingError, match="PeftcoreCallback"):
        backward(ours.train())


def test_a_step_that_it_was_told_of_passes() -> None:
    ours = model()
    injection = ours.adapters["default"]
    optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-3)
    for step in range(1, 5):
        backward(ours)
        optimizer.step()
        take_steps(scheduled(injection), step, 6)
    assert injection.steps_taken == 4


def test_the_method_s_own_optimizer_tells_it() -> None:
    ours = model()
    optimizer = ours.adapters["default"].optimizer(torch.optim.AdamW, lr=1e-3, total_steps=6)
    for _ in range(4):
        backward(ours)
        optimizer.step()


def test_other_models_and_methods_without_a_schedule_train_on() -> None:
    ours, other = model(), compat.get_peft_model(host("llama"), "lora").train()
    backward(ours)
    optimizer = torch.optim.AdamW([each for each in other.parameters() if each.requires_grad], lr=1e-3)
    for _ in range(3):
        backward(other)
        optimizer.step()
    backward(ours)
    assert not peftcore.injections(host("llama"))
