"""What is written between a forward and its recomputation in backward: the gradient is right, or an error says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.testing.kit import fill

OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "hra": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 2},
    "hira": {"rank": 2},
    "fourierft": {"n_frequency": 12},
    "randlora": {"rank": 2},
    "svdiff": {},
    "lora": {"rank": 2},
    "ia3": {},
}
Writer = Callable[["Host", peftcore.Injection], None]


class Host(nn.Module):
    """Computes something of the input of a layer, after that layer."""

    def __init__(self, layer: nn.Module, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.layer, self.write = nn.Linear(6, 8), layer, write

    def forward(self, x: Tensor) -> Tensor:
        z = self.before(x).view(2, 8, 3, 3) if isinstance(self.layer, nn.Conv2d) else self.before(x)
        y = self.layer(z)
        return (y.square().sum() + self.write(z).square().sum()) * 1.0


def host(kind: str, write: Callable[[Tensor], Tensor]) -> tuple[Host, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=1) if kind == "conv" else nn.Linear(8, 8)
    return Host(layer, write), torch.randn(*((18,) if kind == "conv" else (5,)), 6)


def gradients(injection: peftcore.Injection, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(injection.parameters())))


def right_or_refused(found: Callable[[], list[Tensor]], expected: list[Tensor]) -> None:
    try:
        each = found()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "between its forward and backward" in str(error)
        return
    for one, other in zip(each, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("method", OPTIONS)
def test_an_input_that_is_overwritten_after_the_call(method: str, low_memory: bool, kind: str) -> None:
    results = []
    for write in (torch.relu_, torch.relu):
        model, x = host(kind, write)
        injection = peftcore.apply(model, method, target="layer", **OPTIONS[method])
        fill(injection, 0)
        injection.low_memory = low_memory
        results.append((injection, model(x)))
    (written, loss), (kept, reference) = results
    right_or_refused(lambda: gradients(written, loss), gradients(kept, reference))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("method", OPTIONS)
def test_an_input_that_is_refilled_for_the_next_batch(method: str, low_memory: bool) -> None:
    model, _ = host("linear", torch.relu)
    injection = peftcore.apply(model, method, target="layer", **OPTIONS[method])
    fill(injection, 0)
    injection.low_memory = low_memory
    buffer, first, second = torch.zeros(5, 8), torch.randn(5, 8), torch.randn(5, 8)
    expected = gradients(injection, model.layer(first).square().sum())
    loss = model.layer(buffer.copy_(first)).square().sum()
    buffer.copy_(second)
    right_or_refused(lambda: gradients(injection, loss), expected)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("whose", ["adapter", "base"])
@pytest.mark.parametrize("method", OPTIONS)
def test_parameters_that_are_stepped_between_two_backwards(method: str, whose: str, low_memory: bool) -> None:
    model, x = host("linear", torch.relu)
    injection = peftcore.apply(model, method, target="layer", **OPTIONS[method])
    fill(injection, 0)
    injection.low_memory = low_memory
    expected = gradients(injection, model(x))
    loss = model(x)
    torch.autograd.grad(loss, list(injection.parameters()), retain_graph=True)
    with torch.no_grad():
        for parameter in injection.parameters() if whose == "adapter" else [model.layer.weight]:
            parameter.add_(0.5)
    right_or_refused(lambda: gradients(injection, loss), expected)


@pytest.mark.parametrize("method", OPTIONS)
def test_another_adapter_that_is_merged_meanwhile(method: str) -> None:
    model, x = host("linear", torch.relu)
    other = peftcore.apply(model, "lora", target="layer", name="other", rank=2)
    fill(other, 1)
    injection = peftcore.apply(model, method, target="layer", name="own", **OPTIONS[method])
    fill(injection, 0)
    expected = gradients(injection, model(x))
    loss = model(x)
    other.merge()
    right_or_refused(lambda: gradients(injection, loss), expected)
