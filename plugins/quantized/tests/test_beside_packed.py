"""Methods that change weights act beside a packed one: neither a step nor a token makes the effective weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftcore

METHODS = ("dora", "oft", "boft", "hra", "loha", "lokr")
SCHEMES = ("nf4", "int4", "bnb-nf4", "torchao-int8", "hqq-4")
"""Not those that round what goes in: there a layer is not its weight times the input."""


def adapted(scheme: str, method: str) -> tuple[nn.Module, peftcore.Injection]:
    """A packed layer and what acts there, away from its start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256)).eval()
    peftcore.quantize(model, scheme)
    injection = peftcore.apply(model, method, target="0")
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model, injection


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_effective_weight_is_made(scheme: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, injection = adapted(scheme, method)
    x = torch.randn(300, 256)
    bias = model[0].bias
    expected = nn.functional.linear(x, injection.sites[0].weight(), bias)
    tolerance = 1e-4 * expected.std().item()
    operator = type(injection.operators["0"])
    with monkeypatch.context() as patch:
        patch.setattr(operator, "forward", lambda self, weight: pytest.fail("made the weight"))
        trained = model(x)
        trained.sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in injection.parameters())
        with torch.no_grad(), peftcore.cache_weights(model):
            evaluated = model(x)
            patch.setattr(operator, "prepare", lambda self, held: pytest.fail("prepared again"))
            again = model(x)
    for output in (trained, evaluated, again):
        torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    with injection.disabled():
        assert (model(x) - expected).abs().max() > 10 * tolerance
