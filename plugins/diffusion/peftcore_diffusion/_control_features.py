"""The network of ControlNeXt: an image and timesteps in, one feature for the stream of a UNet out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TIME, GROUPS = 128, (2, 4, 8)
"""Sines and cosines of a timestep, and the groups of the norms, stage by stage."""


def waves(timesteps: Tensor) -> Tensor:
    """Return cosines and sines of timesteps [batch], [batch, TIME]."""
    half = TIME // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.to(torch.float32)[:, None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimedResidual(nn.Module):
    """A residual block that reads the timestep, and a convolution that halves its resolution."""

    def __init__(self, width: int, out: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm, self.wide = nn.GroupNorm(groups, width, eps=1e-6), nn.Conv2d(width, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.last_norm, self.last = nn.GroupNorm(groups, out, eps=1e-6), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        self.halve = nn.Conv2d(out, out, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.wide(nn.functional.silu(self.norm(x)))
        y = y + self.time(nn.functional.silu(time))[:, :, None, None]
        y = self.last(nn.functional.silu(self.last_norm(y)))
        halved: Tensor = self.halve(self.skip(x) + y)
        return halved


class ControlFeatures(nn.Module):
    """Maps an image [batch, channels, height, width] to a feature [batch, out, height / 8, width / 8]."""

    def __init__(self, channels: int, widths: list[int], out: int) -> None:
        super().__init__()
        first, middle, last = widths
        self.time = nn.Sequential(nn.Linear(TIME, last), nn.SiLU(), nn.Linear(last, last))
        ends, stem = (channels, first, first, middle), []
        for number in range(3):
            stem += [
                nn.Conv2d(*ends[number : number + 2], 3, stride=1 if number else 2, padding=1),
                nn.GroupNorm(GROUPS[0], ends[number + 1]),
                nn.ReLU(),
            ]
        self.stem = nn.Sequential(*stem)
        sizes = ((middle, middle), (middle, last))
        self.stages = nn.ModuleList(
            TimedResidual(*size, last, groups) for size, groups in zip(sizes, GROUPS[1:], strict=True)
        )
        self.mix = nn.Sequential(
            nn.Conv2d(last, last, 3, padding=1),
            nn.ReLU(),
            nn.GroupNorm(GROUPS[2], last),
            nn.Conv2d(last, last, 3, padding=1),
            nn.GroupNorm(GROUPS[2], last),
        )
        self.out = nn.Conv2d(last, out, 1)

    def forward(self, image: Tensor, timesteps: Tensor) -> Tensor:
        dtype = self.out.weight.dtype
        time = self.time(waves(timesteps).to(dtype))
        x = self.stem(image.to(dtype))
        for stage in self.stages:
            x = stage(x, time)
        feature: Tensor = self.out(self.mix(x) + x)
        return feature


def cross_normalized(feature: Tensor, stream: Tensor) -> Tensor:
    """Return a feature with the mean and the deviation that the stream has, over all values of a row; in the dtype of
    the feature, since float16 cannot represent 1e-12."""
    stream = stream.to(feature.dtype)
    over = tuple(range(1, feature.dim()))
    mean, std = (each(feature, dim=over, keepdim=True) for each in (torch.mean, torch.std))
    wanted_mean, wanted_std = (each(stream, dim=over, keepdim=True) for each in (torch.mean, torch.std))
    return (feature - mean) * (wanted_std / (std + 1e-12)) + wanted_mean
