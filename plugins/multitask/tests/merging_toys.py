"""What the tests of merging methods share: a small host in float64, and adapters with noise in them."""

from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.injection.injection import Injection
from peftcore.testing.kit import fill


class Host(nn.Module):
    """Two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def host() -> Host:
    torch.manual_seed(0)
    return Host().double().eval()


X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def applied(model: nn.Module, method: Any, seed: int = 1, **options: Any) -> Injection:
    """Applied in float64, its tensors filled with N(0, 0.1)."""
    injection = peftcore.apply(model, method, dtype="float64", **options)
    fill(injection, seed)
    return injection


def moved(model: nn.Module) -> bool:
    """Whether the output is another one than the bare host's: by more than a thousand times what counts as equal."""
    with torch.no_grad():
        return float((model(X) - host()(X)).abs().max()) > 1e-6


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) < 1e-10
