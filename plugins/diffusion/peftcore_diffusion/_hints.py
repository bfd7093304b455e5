"""The network of a controllable SC-Tuner: an image in, a hint for each skip connection of a UNet out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peftcore_diffusion._skips import Skip


class Hints(nn.Module):
    """Maps an image to hints, first to last. The image is 2^(len(widths) - 1) times as large as the UNet's input."""

    def __init__(self, skips: Iterable[Skip], channels: int, widths: list[int], kernel: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.SiLU(), nn.Conv2d(narrow, narrow, 3, padding=1)]
            layers += [nn.SiLU(), nn.Conv2d(narrow, wide, 3, stride=2, padding=1)]
        self.first, self.cascade = nn.Sequential(*layers), nn.ModuleList()
        width = widths[-1]
        for skip in skips:
            layer = nn.Conv2d(width, skip.width, kernel, stride=2 if skip.halved else 1, padding=kernel // 2)
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            self.cascade.append(layer)
            width = skip.width

    def forward(self, image: Tensor) -> list[Tensor]:
        hints: list[Tensor] = [self.first(image.to(self.first[0].weight.dtype))]
        for layer in self.cascade:
            hints.append(layer(torch.nn.functional.silu(hints[-1])))
        return hints[1:]
