"""A host of one layer, for tests of methods that change a weight."""

from typing import Any

from torch import Tensor, nn


class One(nn.Module):
    """A host of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Any:
        return self.layer(*args)
