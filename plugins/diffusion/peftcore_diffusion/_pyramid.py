"""The network of a T2I-Adapter: an image in, a feature for each block of a UNet's encoder out."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Place:
    """A block of the encoder to which a feature is added."""

    path: str
    """The path of the module to whose output the feature is added."""
    width: int
    level: int
    """How often that output was halved."""


class Residual(nn.Module):
    """One residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.point(torch.relu(self.wide(x)))
        return x + y


class Pyramid(nn.Module):
    """Maps an image, `downscale` times as large as the activation at level 0, to one feature for each place."""

    def __init__(self, places: list[Place], channels: int, downscale: int, blocks: int) -> None:
        super().__init__()
        width, level, stages = places[0].width, places[0].level, []
        factor = downscale * 2**level
        self.first = nn.Sequential(nn.PixelUnshuffle(factor), nn.Conv2d(channels * factor**2, width, 3, padding=1))
        for place in places:
            halve = [nn.AvgPool2d(2, ceil_mode=True) for _ in range(place.level - level)]
            change = [nn.Conv2d(width, place.width, 1)] if width != place.width else []
            stages.append(nn.Sequential(*halve, *change, *(Residual(place.width) for _ in range(blocks))))
            width, level = place.width, place.level
        self.stages = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = [self.first(image.to(self.first[1].weight.dtype))]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[1:]
