"""`generate` of an adapted model: weights are computed once a call."""

import copy
import inspect
from typing import Any

import torch
from core_toys import Shift, ShiftOperator
from torch import Tensor, nn

import peftcore


class Counting(ShiftOperator):
    """Counts how often the effective weight is built."""

    count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return super().forward(weight)


class Decoder(nn.Sequential):
    """Gives what it returned to itself again."""

    def generate(self, x: Tensor, *, steps: int = 3) -> Tensor:
        for _ in range(steps):
            x = self(x)
        return x


@torch.no_grad()
def test_the_weight_is_built_once_a_call() -> None:
    model = Decoder(nn.Linear(4, 4)).eval()
    injection = peftcore.apply(model, Shift, target="0")
    operator: Any = injection.operators["0"]
    operator.__class__ = Counting
    assert list(inspect.signature(model.generate).parameters) == ["x", "steps"]
    for expected in (1, 2):
        model.generate(torch.ones(1, 4), steps=4)
        assert operator.count == expected
    copied = copy.deepcopy(model)
    before = copied.generate(torch.ones(1, 4))
    assert operator.count == 2  # it is the copy that ran
    operator.shift.data.add_(1)
    assert torch.equal(copied.generate(torch.ones(1, 4)), before)
    injection.remove()
    assert "generate" not in vars(model)


@torch.no_grad()
def test_a_part_that_generates_and_a_write_between_two_tokens() -> None:
    """A callback that writes as one does is seen."""

    class Writing(Decoder):
        def generate(self, x: Tensor, *, steps: int = 3) -> Tensor:
            outputs = []
            for _ in range(steps):
                outputs.append(self(x))
                self.operator.shift.add_(1)
            return torch.stack(outputs)

    model = nn.ModuleDict({"decoder": Writing(nn.Linear(4, 4))}).eval()
    injection = peftcore.apply(model, Shift, target="decoder.0")
    vars(model["decoder"])["operator"] = injection.operators["decoder.0"]
    outputs = model["decoder"].generate(torch.ones(1, 4))
    assert len({tuple(each.flatten().tolist()) for each in outputs}) == 3
