"""The sources of explicit prompts: frequencies of the picture, and frozen embeddings of its patches, by stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import MethodConfig, Operator, Tap
from peftcore_vision._stages import NORM, StageSite


class ExplicitConfig(MethodConfig):
    """Options of the sources of prompts."""

    reduction: PositiveInt = 4
    """How many times narrower than the stream prompts are inside."""
    share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25
    """The share of all frequencies that count as low."""
    frequencies: Literal["high", "low", "none"] = "high"
    """The frequencies of the picture that prompts are made of."""
    patches: bool = True
    """Make them of the frozen embeddings of patches too."""


def starting(linear: nn.Linear, zero: bool = False) -> nn.Linear:
    """Return a linear map with the start of the authors' code."""
    nn.init.zeros_(linear.weight) if zero else nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def frequencies(x: Tensor, share: float, low: bool) -> Tensor:
    """Return the size of pictures [..., high, wide] without their low frequencies, or of the low frequencies alone."""
    high, wide = x.shape[-2:]
    line = int((high * wide * share) ** 0.5 // 2)
    mask = torch.zeros(high, wide, dtype=torch.bool, device=x.device)
    mask[high // 2 - line : high // 2 + line, wide // 2 - line : wide // 2 + line] = True
    mask = torch.fft.ifftshift(mask if low else ~mask)
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.fft.ifft2(torch.fft.fft2(exact) * mask).real.abs()


def channels(site: StageSite, config: ExplicitConfig) -> int:
    """Return how many channels the convolution of a stage reads."""
    return site.before // config.reduction or site.in_features


class StageOperator(Operator):
    """The maps from one stage's patches and from the picture to features for the prompts of its blocks."""

    def __init__(self, site: StageSite, config: ExplicitConfig, taps: list[tuple[Tap, Tap]]) -> None:
        super().__init__(site)
        conv, number = site.module, site.number
        assert isinstance(conv, nn.Conv2d), "stages begin with one"
        d, c = site.out_features, site.out_features // config.reduction
        self.read = taps[number - 1][0] if number else None
        self.left, self.feature = taps[number]
        self.share, self.low = config.share, config.frequencies == "low"
        self.embedding = starting(nn.Linear(d, c)) if config.patches else None
        self.filter: nn.Conv2d | None = None
        self.norm: nn.LayerNorm | None = None
        if config.frequencies != "none":
            inputs = channels(site, config)
            shape: Any = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
            self.filter = nn.Conv2d(inputs, c, **shape)
            nn.init.normal_(self.filter.weight, std=(2.0 / (site.kernel[0] * site.kernel[1] * c)) ** 0.5)
            nn.init.zeros_(self.filter.get_parameter("bias"))
            self.norm = nn.LayerNorm(c) if site.normed else None
        self.normed = site.normed

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._behind_norm if form == NORM else self

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self.filter is not None:
            h = frequencies(x, self.share, self.low) if self.read is None else self.read.get()
            h = self.filter(h.to(self.filter.weight.dtype)).movedim(1, -1)  # [batch, rows, columns, c]
            h = h if self.norm is None else self.norm(h)
            self.left.put(h.movedim(-1, 1))
        y = call(x)
        if not self.normed:
            self._put(y.flatten(2).transpose(1, 2))
        return y

    def _behind_norm(self, call: Callable[..., Tensor], y: Tensor) -> Tensor:
        y = call(y)
        self._put(y.flatten(1, -2))
        return y

    def _put(self, patches: Tensor) -> None:
        """Leave the features of patches [batch, patches, d] for the blocks, [batch, patches, c]."""
        feature: Tensor | float = 0.0 if self.filter is None else self.left.get().flatten(2).transpose(1, 2)
        if self.embedding is not None:
            feature = feature + self.embedding(patches.to(self.embedding.weight.dtype))
        self.feature.put(feature)
