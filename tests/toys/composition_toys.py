"""A host of layers on which several adapters act together."""

import torch
from torch import Tensor, nn

import peftcore
from peftcore.testing.kit import fill

METHODS = {"a": "lora", "b": "dora", "c": "houlsby_adapter", "d": "ia3"}


class Layers(nn.Module):
    """Two linear layers with a bend between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def several_adapters() -> nn.Module:
    """Two layers in float64, and an adapter of each of METHODS on both."""
    torch.manual_seed(0)
    model = Layers().double()
    for name, method in METHODS.items():
        fill(peftcore.apply(model, method, name=name, target=["first", "second"], dtype=torch.float64), ord(name))
    return model
