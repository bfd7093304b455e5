"""Models of two layers, for tests beside other libraries: what belongs to which layer matters there."""

from typing import Any

import torch
from torch import Tensor, nn


class Two(nn.Module):
    """Two layers with a tanh between them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.tanh(self.first(x)))


class Loss(nn.Module):
    """A layer, and with ``y`` the mean of the squares of its error."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.layer(x)
        return out if y is None else (out - y).square().mean()
