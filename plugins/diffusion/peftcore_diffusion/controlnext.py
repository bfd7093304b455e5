"""ControlNeXt: one light network whose feature is added to the stream of a UNet.   Peng et al. 2024, arXiv 2408.06070.

Equation:
    h <- h + scale * CN(c, h),   CN(c, h) = (c - mean(c)) * std(h) / (std(c) + 1e-12) + mean(h),   c = pool(F(image, t))

h [batch, width, rows, columns] is the output of the first encoder block that the next block reads. The block's outputs
for the skips are unchanged. With ``before`` h is the block's input, for SDXL. Means and standard deviations are
computed over all channels and pixels of each batch entry (cross normalization). F halves the resolution of the image
three times. It consists of three convolutions, two residual blocks that read the timestep, one more residual block of
two convolutions, and a 1x1 convolution to the width of h. pool averages (or repeats) pixels to the size of h.

A part of the base trains too, with a learning rate `control_rate` times lower than that of F. By default it is the
output matrices and biases of all attentions; with ``base="cross"`` only those of cross-attention, as for SDXL. With
``base="none"`` the base stays frozen.

Pass the image to a call: ``with peftcore.call(model, condition=image): ...``. Its shape is [batch or 1, channels,
height, width], 8 times as large as the latents. ``condition_scale=`` in the same call replaces `scale`; the authors'
scripts use 0.35 for edges. The option `input` sets another name for the image.

It cannot be merged. Parameters: in * out + out for each trained matrix of the base. F has, with its `widths` w, v, u, c
channels of the image and d channels of h: 9w (c + w + v) + 27 v^2 + 11 v u + 38 u^2 + (128 + d) u + 6w + 13v + 15u + d.

Start: F as torch's layers do, the trained part of the base at its weights. The start is an identity only with a scale
of 0.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "controlnext")`, where a ControlNet is too large or too slow to train; not to copy a
picture's style (`ip_adapter`), nor where the base must not train. The similar `t2i_adapter` adds features to all
blocks, and does not read the timestep.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Site,
    Surgeon,
    Tags,
    forward_context,
    on_first,
)
from peftcore.errors import UnsupportedSite
from peftcore_diffusion._told import timesteps, told

BLOCK = re.compile(r"((?:.*\.)?)down_blocks\.\d+")
BASES = {"attention": ("attn.out", "cross.out"), "cross": ("cross.out",), "none": ()}


class ControlNeXtConfig(MethodConfig):
    """Options of ControlNeXt."""

    method: Literal["controlnext"] = "controlnext"
    scale: NonNegativeFloat = 1.0
    """The factor on the feature, unless a call passes ``condition_scale=``."""
    before: bool = False
    """Add the feature to the block's input instead of its output."""
    base: Literal["attention", "cross", "none"] = "attention"
    """The attentions whose output matrices train too: all, cross-attention only, or none."""
    channels: PositiveInt = 3
    """Channels of the condition image."""
    widths: list[Annotated[int, Field(ge=8, multiple_of=8)]] = Field(
        default_factory=lambda: [64, 128, 256], min_length=3, max_length=3
    )
    """Three numbers of channels in F, the network that reads the image: of its first two convolutions, of its third
    convolution and first residual block, and of all layers from its second residual block on."""
    control_rate: PositiveFloat = 10.0
    """Learning rate of F, the network that reads the image, divided by the learning rate of the base's trained
    matrices. The latter is that of the optimizer."""
    input: str = "condition"
    """The name under which calls pass the image: ``peftcore.call(model, condition=image)`` by default."""


@dataclasses.dataclass(frozen=True, eq=False)
class ControlSite(Site):
    """A block of a UNet's encoder, and the width of the stream where the feature is added."""

    width: int = dataclasses.field(kw_only=True)


class ControlNeXtOperator(Operator):
    """Adds the feature of the image to the stream, before or after a block."""

    def __init__(self, site: ControlSite, config: ControlNeXtConfig) -> None:
        super().__init__(site)
        self.name, self.scale, self.before = config.input, config.scale, config.before
        self.features = ControlFeatures(config.channels, config.widths, site.width)

    def forward(self, call: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.before:
            return call(self._controlled(hidden_states), *args, **kwargs)
        return on_first(call(hidden_states, *args, **kwargs), self._controlled)

    def _controlled(self, stream: Tensor) -> Tensor:
        """Return the stream [batch, width, rows, columns] after adding the feature."""
        rows = len(stream)
        feature = self.features(told(self.name, rows), timesteps(rows, stream.device))
        feature = nn.functional.adaptive_avg_pool2d(feature, (stream.shape[-2], stream.shape[-1]))
        scale = forward_context().context.get(f"{self.name}_scale", self.scale)
        return stream + (scale * cross_normalized(feature, stream)).to(stream.dtype)


class ControlNeXt(Method):
    """The feature of a condition image, added to the stream after one block, and trained output matrices of attention.

    Example:
        injection = peftcore.apply(model, "controlnext")
        peftcore.call(model, condition=torch.rand(1, 3, 64, 64))  # 8 times as large as the latents
    """

    name = "controlnext"
    Config = ControlNeXtConfig
    tags = Tags(category="diffusion", paper="2408.06070", identity_at_init=False, identity_options={"scale": 0.0})
    learning_rate = LearningRate(
        1e-5,
        "dvlab-research/ControlNeXt@ab4b3ac, ControlNeXt-SD1.5-Training/scripts.sh",
        on="Stable Diffusion 1.5, Fill50K; ten times as much for F",
    )
    target = (r"re:(.*\.)?down_blocks\.0",)

    def inject(self, model: nn.Module, config: ControlNeXtConfig, surgeon: Surgeon) -> None:
        found: dict[str, Site] = {}
        for site in surgeon.sites():
            options, place = config.at(site.path), BLOCK.fullmatch(site.module_path)
            width = _width(surgeon, site, options.before)
            if place is None or not width:
                raise UnsupportedSite(
                    f"{site.path or 'the host'} is not a block of a UNet's encoder; target one such as down_blocks.0"
                )
            surgeon.graft(ControlSite(**vars(site), width=width), ControlNeXtOperator, config)
            matrices = (each for role in BASES[options.base] for each in surgeon.at(role))
            found |= {each.path: each for each in matrices if each.module_path.startswith(place[1])}
        for site in found.values():
            for tensor in site.tensors():
                if not site.missing(tensor):
                    surgeon.replace(site.at(tensor))

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        groups: dict[float, list[nn.Parameter]] = {}
        for graft in injection.grafts:
            if graft.by_method:
                options, control = injection.config.at(graft.site.path), isinstance(graft.site, ControlSite)
                own = [each for each in graft.operator.parameters() if each.requires_grad]
                groups.setdefault(options.control_rate * lr if control else lr, []).extend(own)
        return [{"params": own, **defaults, "lr": rate} for rate, own in groups.items()]

    @staticmethod
    def parameter_count(site: Site, config: ControlNeXtConfig) -> int:
        if not isinstance(site, ControlSite):
            return site.numel
        c, d, (w, v, u) = config.channels, site.width, config.widths
        norms = 6 * w + 13 * v + 15 * u + d
        return 9 * w * (c + w + v) + 27 * v**2 + 11 * v * u + 38 * u**2 + (128 + d) * u + norms


def _width(surgeon: Surgeon, site: Site, before: bool) -> int:
    """Return the number of channels of a block's input or output; 0 if the block does not contain resnets with
    convolutions."""
    inside, entries = f"{site.module_path}.resnets.", surgeon.resolver.host.entries
    shapes = [entry.shape for entry in entries if entry.role == "conv" and entry.module.startswith(inside)]
    return (shapes[0][1] if before else shapes[-1][0]) if shapes else 0


TIME, GROUPS = 128, (2, 4, 8)
"""The number of sines and cosines of a timestep, and the numbers of groups of the norms, by stage."""


def waves(timesteps: Tensor) -> Tensor:
    """Return cosines and sines [batch, TIME] of timesteps [batch]."""
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
        """Return the block's output for an activation and the embedding of the timestep."""
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
        for number, (narrow, wide) in enumerate(itertools.pairwise(ends)):
            stem += [
                nn.Conv2d(narrow, wide, 3, stride=1 if number else 2, padding=1),
                nn.GroupNorm(GROUPS[0], wide),
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
        """Return the feature of an image at its timesteps."""
        dtype = self.out.weight.dtype
        time = self.time(waves(timesteps).to(dtype))
        x = self.stem(image.to(dtype))
        for stage in self.stages:
            x = stage(x, time)
        feature: Tensor = self.out(self.mix(x) + x)
        return feature


def cross_normalized(feature: Tensor, stream: Tensor) -> Tensor:
    """Return the feature, normalized to the stream's mean and standard deviation over all values of each batch entry.
    It keeps the feature's dtype, since float16 cannot represent 1e-12."""
    stream = stream.to(feature.dtype)
    over = tuple(range(1, feature.dim()))
    mean, std = (each(feature, dim=over, keepdim=True) for each in (torch.mean, torch.std))
    wanted_mean, wanted_std = (each(stream, dim=over, keepdim=True) for each in (torch.mean, torch.std))
    return (feature - mean) * (wanted_std / (std + 1e-12)) + wanted_mean
