"""T2I-Adapter: features of a condition image for the encoder of a UNet.   Mou et al. 2023, arXiv 2302.08453.

Equation:
    F_0 = conv(unshuffle(image)),   F_i = R_i(pool(F_{i-1})),   h_i <- h_i + scale * F_i   at the end of encoder block i

R_i is a 1x1 convolution if the width changes, followed by `blocks` residual blocks x + conv_1x1(relu(conv_3x3(x))). F
does not depend on the timestep. Pass the image to a call: ``with peftcore.call(model, condition=image): ...``. Its
shape is [batch or 1, channels, height, width], `downscale` times as large as the latents. ``condition_scale=`` in the
same call replaces `scale`. If several adapters read different images, set another name for each image with the option
`input`.

In blocks with attention F is added after the last attention, before the resolution is halved; in other blocks it is
added to their output, as in diffusers. So for Stable Diffusion 1.5 the four stages are those of the authors' adapter
(TencentARC/T2I-Adapter). For SDXL there are three stages: the fourth feature of the authors' adapter, which they add at
the middle block, is left out. All sizes are derived from the model. The method cannot be merged.

Parameters, with widths c_i: 9 channels f^2 c_0 + c_0, where f is `downscale`, or twice `downscale` for SDXL. Each stage
adds blocks * (10 c_i^2 + 2 c_i), and c_{i-1} c_i + c_i if both widths differ.

Start: All layers start as torch's layers do. The start is an identity only with a scale of 0.

Differs from the authors' code: The authors' light variant is not implemented. Their code (TencentARC/T2I-Adapter) was
not run; outputs are compared with diffusers.

Use it: `peftcore.apply(model, "t2i_adapter")`, to control images by sketches, depth maps or poses; it is smaller and
faster than ControlNet.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    forward_context,
)
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore_diffusion._told import told


class T2IAdapterConfig(MethodConfig):
    """Options of T2I-Adapter."""

    overridable = ()

    method: Literal["t2i_adapter"] = "t2i_adapter"
    scale: NonNegativeFloat = 1.0
    """The factor on the features, unless a call passes ``condition_scale=``."""
    channels: PositiveInt = 3
    """Channels of the condition image; 1 for sketches and edges."""
    downscale: PositiveInt = 8
    """How many times larger the image is than the host's input. Use the downscaling factor of the autoencoder."""
    blocks: PositiveInt = 2
    """Number of residual blocks in each stage."""
    input: str = "condition"
    """The name under which calls pass the image: ``peftcore.call(model, condition=image)`` by default."""


class T2IAdapterOperator(Operator):
    """Adds the feature of one block; the first operator that runs computes the features of all blocks."""

    def __init__(
        self, site: Site, config: T2IAdapterConfig, place: Place, number: int, shared: Shared, features: Tap
    ) -> None:
        super().__init__(site)
        self.number, self.pyramid, self.features = number, shared, features
        self.name, self.scale, self.factor = config.input, config.scale, config.downscale * 2**place.level
        self.first = False

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        if self.first:
            self.features.put(self._compute(hidden))
        scale = forward_context().context.get(f"{self.name}_scale", self.scale)
        changed = hidden + scale * self.features.get()[self.number].to(hidden.dtype)
        if not isinstance(output, tuple):
            return changed
        rest = ((*states[:-1], changed) for states in output[1:])  # the last state of a block is what it returns
        return (changed, *rest)

    def _compute(self, hidden: Tensor) -> Any:
        image = told(self.name, len(hidden))
        wanted = [size * self.factor for size in hidden.shape[-2:]]
        if list(image.shape[-2:]) != wanted:
            raise ConfigError(f"{self.name} is {list(image.shape[-2:])}; resize it to {wanted}")
        return self.pyramid.module(image)


class T2IAdapter(Method):
    """Features of a condition image in the encoder.

    Example:
        injection = peftcore.apply(model, "t2i_adapter", channels=1)
        peftcore.call(model, condition=torch.rand(1, 1, 64, 64))  # 8 times as large as the latents
    """

    name = "t2i_adapter"
    Config = T2IAdapterConfig
    tags = Tags(category="diffusion", paper="2302.08453", identity_at_init=False, identity_options={"scale": 0.0})
    learning_rate = LearningRate(
        1e-5,
        "TencentARC/T2I-Adapter@16bba67, configs/stable-diffusion/train_sketch.yaml",
        on="Stable Diffusion 1.x, sketches",
    )
    target = (r"re:(.*\.)?down_blocks\.\d+",)

    def inject(self, model: nn.Module, config: T2IAdapterConfig, surgeon: Surgeon) -> None:
        sizes = config.channels, config.downscale, config.blocks
        stacks: dict[str, list[Site]] = {}
        for site in surgeon.sites():
            stacks.setdefault(site.module_path.rpartition(".")[0], []).append(site)
        for stack, sites in stacks.items():
            numbers = [_number(site) for site in sites]
            places = [_place(surgeon, stack, number) for number in range(max(numbers) + 1)]  # also of what is left out
            pyramid = surgeon.own(f"pyramid_{stack}", functools.partial(Pyramid, places, *sizes))
            features = Tap(until_backward=True)
            for number in sorted(numbers):
                site = dataclasses.replace(surgeon.resolver.site(places[number].path, "weight"), meta=sites[0].meta)
                operator = surgeon.graft(
                    site,
                    T2IAdapterOperator,
                    config,
                    place=places[number],
                    number=number,
                    shared=pyramid,
                    features=features,
                )
                operator.first = number == min(numbers)

    @staticmethod
    def parameter_count(site: Site, config: T2IAdapterConfig) -> int:
        return 0  # the network belongs to no block


def _number(site: Site) -> int:
    number = site.module_path.rpartition(".")[2]
    if not number.isdecimal():
        raise UnsupportedSite(f"{site.path or 'the host'} is not a block of a UNet's encoder; target its down_blocks")
    return int(number)


def _place(surgeon: Surgeon, stack: str, number: int) -> Place:
    modules, path = surgeon.resolver.modules, f"{stack}.{number}"
    convolutions = (entry for entry in surgeon.resolver.host.entries if entry.role == "conv")
    widths = [entry.shape[0] for entry in convolutions if entry.module.startswith(f"{path}.resnets.")]
    if not widths:
        raise UnsupportedSite(f"{path} is not a block of a UNet's encoder; target its down_blocks")
    attentions = [each for each in modules if each.rpartition(".")[0] == f"{path}.attentions"]
    halving = range(number if attentions else number + 1)
    level = sum(f"{stack}.{each}.downsamplers" in modules for each in halving)
    return Place([path, *attentions][-1], widths[-1], level)


@dataclasses.dataclass(frozen=True)
class Place:
    """A block of the encoder to which a feature is added."""

    path: str
    """The path of the module to whose output the feature is added."""
    width: int
    level: int
    """How many times the resolution of that output was halved."""


class Residual(nn.Module):
    """One residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + conv_1x1(relu(conv_3x3(x)))``."""
        y: Tensor = self.point(torch.relu(self.wide(x)))
        return x + y


class Pyramid(nn.Module):
    """Maps an image to one feature for each place. The image is `downscale` times as large as an activation whose
    resolution was not halved."""

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
        """Return the features of an image, one for each place."""
        features = [self.first(image.to(next(self.first.parameters()).dtype))]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[1:]
