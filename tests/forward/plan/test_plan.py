"""What acts at one module under one choice, planned once."""

from typing import Any

import pytest
import torch
from core_toys import (
    perceptron,
    stir,
)

import peftcore

BESIDE: dict[str, dict[str, Any]] = {
    "boft": {"block_size": 2, "factors": 1},
    **{name: {} for name in ("dora", "hra", "loha", "lokr", "oft", "randlora")},
}
"""Methods on weights that can act beside them."""


@pytest.mark.parametrize("method", BESIDE)
def test_with_low_memory_training_computes_the_weight_and_gives_the_same_numbers(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perceptron().double()
    injection = peftcore.apply(model, method, target=["first", "second"], dtype="float64", **BESIDE[method])
    stir(injection)
    operator = type(next(iter(injection.operators.values())))
    found = []
    for low_memory in (False, True, False):
        injection.low_memory = low_memory
        asked: list[bool] = []
        with monkeypatch.context() as patch:
            patch.setattr(operator, "prefers_activation_form", lambda self, x, asked=asked: not asked.append(True))
            output = model(torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4))
        assert (not asked) is low_memory is injection.low_memory
        found.append([output, *torch.autograd.grad(output.square().sum(), list(injection.parameters()))])
    for beside, on, again in zip(*found, strict=True):
        torch.testing.assert_close(on, beside)
        assert torch.equal(again, beside)
