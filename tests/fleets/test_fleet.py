"""`Fleet`: each member's trajectory is the one that it takes alone."""

from typing import Any

import pytest
import torch
from fleet_toys import ADAMW, SGD, STEPS, alone, applied, expect_same, llama, next_token, texts

import peftcore
from peftcore.training import Fleet

OPTIMIZERS = {"sgd": (torch.optim.SGD, SGD), "adamw": (torch.optim.AdamW, ADAMW)}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_members_take_the_steps_that_they_take_alone(kind: str) -> None:
    cls, tolerance = OPTIMIZERS[kind]
    model = llama()
    fleet = Fleet(model)
    members = {}
    for name, rank, rate in (("a", 2, 1e-2), ("b", 5, 3e-2)):
        injection = applied(model, "lora", name, rank, rank=rank)
        optimizer = injection.optimizer(cls, lr=rate)
        members[name] = fleet.join(injection, texts(rank), loss=next_token, optimizer=optimizer, steps=STEPS)
    fleet.run()
    assert fleet.forwards == STEPS and fleet.alone == 2 * STEPS
    for name, rank, rate in (("a", 2, 1e-2), ("b", 5, 3e-2)):
        other = llama()
        injection = applied(other, "lora", name, rank, rank=rank)
        losses = alone(other, injection, texts(rank), injection.optimizer(cls, lr=rate))
        assert losses[-1] < losses[0]
        expect_same(members[name], injection, losses, tolerance)
