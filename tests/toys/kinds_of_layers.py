"""A layer of each kind by itself, with an input, and what it gives with another weight: for equations of updates that
are weighed position by position."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(12, 8), torch.randn(2, 3, 12)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), torch.randn(2, 4, 7, 6)),
    "embedding": lambda: (nn.Embedding(20, 6), torch.tensor([[0, 3, 5], [1, 1, 19]])),
}


class OneLayer:
    """A host of one layer in float64.

    Attributes:
        model: the host.
        x: its input.
        channels: the dimension of its output's channels.
    """

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        layer, x = LAYERS[kind]()
        self.kind, self.model = kind, nn.Sequential(layer).double().eval()
        self.x = x.double() if x.is_floating_point() else x
        self.channels = 1 if kind == "conv2d" else -1

    def with_weight(self, weight: Tensor) -> Tensor:
        """Return what the layer gives with a weight ``[out, in, *kernel]`` and without its bias, channels last."""
        layer: Any = deepcopy(self.model[0])
        layer.weight.data = weight.T if self.kind == "embedding" else weight
        layer.bias = None
        made: Tensor = layer(self.x)
        return made.movedim(self.channels, -1)
