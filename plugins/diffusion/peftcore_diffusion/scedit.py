"""SCEdit: tuners of a UNet's skip connections.   Jiang et al. 2023, arXiv 2312.11392.

    skip_i <- skip_i + scale * T_i(skip_i),                            T_i(x) = U_i gelu(D_i x + d_i) + u_i
    skip_i <- skip_i + scale * (c_i + T_i(skip_i + c_i)),              c_i = Z_i silu(c_(i-1)),   c_0 = H(image)

at each place x [width] of a picture: SC-Tuner, and with `channels` the controllable CSC-Tuner, which is steered by an
image. D_i is [r, width], U_i [width, r], r = ratio * width. Z_i are convolutions that start at zero, one behind the
other as the encoder leaves its skips, each with stride 2 where that halved the resolution; H is seven convolutions,
three of them with stride 2. U, u and Z start at zero, so no start changes anything; with an image only the biases of
Z_2, Z_3, ... move in the first step.

The call passes the image, ``with peftcore.call(model, condition=image): ...``, [batch or 1, channels, height,
width], 8 times as large as the latents with four `widths`; the option `input` gives it another name, where several
act, and ``condition_scale=`` in a call takes the place of `scale`. Images of several injections add up. Their code has
3x3 convolutions as Z; the paper's number of parameters is that of ``kernel=1``.

Parameters: 2 width r + r + width for each skip; with an image those of H, and kernel^2 width_(i-1) width_i + width_i.

Use it for a style or a subject where memory is short: backward runs through the decoder alone. Not where the text is
to be understood in another way, for which LoRA in cross-attention is better. With an image it is smaller than
controlnet, its nearest kin, and sees no features of the encoder but the skips. It cannot be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
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
from peftcore.errors import ConfigError
from peftcore_diffusion._hints import Hints
from peftcore_diffusion._skips import SkipSite, skip_sites
from peftcore_diffusion._told import told

OF_ALL = {"channels", "widths", "kernel", "input"}
"""Options of the network that all tuners share."""


class SCEditConfig(MethodConfig):
    """Options of SCEdit."""

    method: Literal["scedit"] = "scedit"
    ratio: PositiveFloat = 1.0
    """The width r inside a tuner, as a part of its skip's."""
    scale: NonNegativeFloat = 1.0
    """By how much tuners count, where the call says nothing else."""
    channels: PositiveInt | None = None
    """Channels of a condition image; without the option, the method reads none."""
    widths: list[PositiveInt] = Field(default_factory=lambda: [16, 32, 96, 256], min_length=1)
    """Channels inside H; all but the first halve the resolution."""
    kernel: Literal[1, 3] = 3
    """Size of the convolutions Z."""
    input: str = "condition"
    """The name under which calls give the image."""


class SCTuner(Operator):
    """Edits the skip that one resnet is given; the first computes the hints of all."""

    changes_inputs, only_inputs = True, True

    def __init__(self, site: SkipSite, config: SCEditConfig, shared: Shared | None, hints: Tap) -> None:
        super().__init__(site)
        self.number, self.width, self.shared, self.hints, self.first = site.number, site.width, shared, hints, False
        self.name, self.scale, self.times = config.input, config.scale, 2 ** (len(config.widths) - 1)
        self.down = nn.Linear(site.width, _inside(site, config))
        self.up = nn.Linear(self.down.out_features, site.width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        before, skip = x.split([x.shape[1] - self.width, self.width], 1)
        scale = forward_context().context.get(f"{self.name}_scale", self.scale)
        edit = scale * self._edit(skip.to(self.down.weight.dtype))
        return call(torch.cat([before, skip + edit.to(x.dtype)], 1), *args, **kwargs)

    def _edit(self, skip: Tensor) -> Tensor:
        if self.shared is None:
            return self._tuned(skip)
        if self.first:
            self.hints.put(self.shared.module(told(self.name, len(skip))))
        hint: Tensor = self.hints.get()[self.number]
        if hint.shape[-2:] != skip.shape[-2:]:
            raise ConfigError(
                f"{self.name} gives {list(hint.shape[-2:])} places where the UNet has {list(skip.shape[-2:])}: resize "
                f"the image to {self.times} times the latents"
            )
        return hint + self._tuned(skip + hint)

    def _tuned(self, skip: Tensor) -> Tensor:
        inside = nn.functional.gelu(self.down(skip.movedim(1, -1)))
        tuned: Tensor = self.up(inside)
        return tuned.movedim(-1, 1)


class SCEdit(Method):
    """Tuners of skip connections.

    Example:
        injection = peftcore.apply(model, "scedit", channels=3)
        peftcore.call(model, condition=torch.rand(1, 3, 64, 64))  # 8 times the latents; with `with`, for a while
    """

    name = "scedit"
    Config = SCEditConfig
    tags = Tags(category="diffusion", paper="2312.11392")
    learning_rate = LearningRate(
        1e-4,
        "modelscope/scepter@9f5b439, scepter/methods/scedit/t2i/sd15_512_sce_t2i.yaml",
        on="Stable Diffusion 1.5, pictures of a 3D style",
    )
    target = (r"re:(.*\.)?up_blocks\.\d+\.resnets\.\d+",)

    def inject(self, model: nn.Module, config: SCEditConfig, surgeon: Surgeon) -> None:
        if any(OF_ALL & own.keys() for own in config.overrides.values()):
            raise ConfigError(f"scedit has one network for all hints: {sorted(OF_ALL)} take no overrides")
        for root, sites in skip_sites(surgeon).items():
            hints, shared = Tap(until_backward=True), None
            if config.channels is not None:
                seen = sites[0].skips[: sites[0].number + 1]  # none of what is left out
                sizes = config.channels, config.widths, config.kernel
                shared = surgeon.own(f"hints_{root}", lambda seen=seen, sizes=sizes: Hints(seen, *sizes))
            for site in sites:
                parts = shared, hints
                operator = surgeon.graft(site, lambda at, own, parts=parts: SCTuner(at, own, *parts), config)
                operator.first = site is sites[0]

    @staticmethod
    def parameter_count(site: Site, config: SCEditConfig) -> int:
        assert isinstance(site, SkipSite)
        width, inside = site.width, _inside(site, config)
        return 2 * width * inside + inside + width


def _inside(site: SkipSite, config: SCEditConfig) -> int:
    """Return the width inside a tuner."""
    return max(1, int(config.ratio * site.width))
