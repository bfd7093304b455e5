"""SCEdit: tuners of a UNet's skip connections.   Jiang et al. 2023, arXiv 2312.11392.

Equation:
    skip_i <- skip_i + scale * T_i(skip_i),                            T_i(x) = U_i gelu(D_i x + d_i) + u_i
    skip_i <- skip_i + scale * (c_i + T_i(skip_i + c_i)),              c_i = Z_i silu(c_(i-1)),   c_0 = H(image)

The equation applies to each pixel x [width] of a skip's features. Without `channels` the method is SC-Tuner, the first
line. With `channels` it is the controllable CSC-Tuner, the second line, which reads a condition image. D_i is [r,
width], U_i [width, r], r = ratio * width. Z_i are consecutive convolutions, one for each skip in the order of the
encoder, with stride 2 if the resolution was halved before that skip; H is seven convolutions, three of them with stride
2.

Pass the image to a call: ``with peftcore.call(model, condition=image): ...``. Its shape is [batch or 1, channels,
height, width]; with four `widths` it is 8 times as large as the latents. ``condition_scale=`` in the same call replaces
`scale`. If several adapters read different images, set another name for each image with the option `input`. The effects
of several images add up. The method cannot be merged.

Parameters: 2 width r + r + width for each skip. With an image, those of H and kernel^2 width_(i-1) width_i + width_i
for each Z_i are added.

Start: U, u and Z at zero: the identity. The inputs of Z_2, Z_3, ... are zero in the first step, so their biases change
in it, but not their kernels.

Differs from the authors' code: No difference from the code is known. The code uses 3x3 convolutions as Z, while the
number of parameters in the paper corresponds to ``kernel=1``.

Use it: `peftcore.apply(model, "scedit")`, to learn a style or a subject with limited memory, since backward runs only
through the decoder. To change how the model interprets texts, LoRA in cross-attention is better. With an image it is
similar to `controlnet`, but smaller, and it reads no features of the encoder except the skips.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable
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
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore_diffusion._told import told


class SCEditConfig(MethodConfig):
    """Options of SCEdit."""

    overridable = ("ratio", "scale")

    method: Literal["scedit"] = "scedit"
    ratio: PositiveFloat = 1.0
    """The width r inside a tuner, as a fraction of its skip's width."""
    scale: NonNegativeFloat = 1.0
    """The factor on the tuners' outputs, unless a call passes ``condition_scale=``."""
    channels: PositiveInt | None = None
    """Channels of the condition image. If None, the method does not read an image."""
    widths: list[PositiveInt] = Field(default_factory=lambda: [16, 32, 96, 256], min_length=1)
    """Channels of the convolutions that read the image. Each width after the first halves the resolution."""
    kernel: Literal[1, 3] = 3
    """Kernel size of the convolutions that compute the image's features for each skip."""
    input: str = "condition"
    """The name under which calls pass the image: ``peftcore.call(model, condition=image)`` by default."""


RESNET = re.compile(r"((?:.*\.)?)up_blocks\.(\d+)\.resnets\.(\d+)")


@dataclasses.dataclass(frozen=True)
class Skip:
    """One skip connection."""

    width: int
    halved: bool
    """True if the resolution was halved just before this skip."""


@dataclasses.dataclass(frozen=True, eq=False)
class SkipSite(Site):
    """A resnet of the decoder, whose input is the previous layer's channels followed by a skip's channels."""

    number: int = dataclasses.field(kw_only=True)
    """The number of the skip that the resnet reads, in the order of the encoder."""
    skips: tuple[Skip, ...] = dataclasses.field(kw_only=True)
    """All skips, in the order of the encoder."""

    @property
    def width(self) -> int:
        """The number of channels of the resnet's skip."""
        return self.skips[self.number].width


def skip_sites(surgeon: Surgeon) -> dict[str, list[SkipSite]]:
    """Return the target resnets of each decoder, in the order in which they run, by the path prefix of their UNet.

    Raises:
        UnsupportedSite: a site is not a resnet of a decoder, or the decoder does not read the skips one by one.
    """
    stacks: dict[str, list[Site]] = {}
    for site in surgeon.sites():
        matched = RESNET.fullmatch(site.module_path)
        if matched is None:
            raise UnsupportedSite(f"{site.path or 'the host'} is not a resnet in the decoder of a UNet; exclude it")
        stacks.setdefault(matched[1], []).append(site)
    found = {}
    for root, sites in stacks.items():
        skips, resnets = tuple(_skips(surgeon, root)), _decoder(surgeon, root)
        _check(surgeon, root, skips, resnets)
        behind = {path: len(skips) - 1 - place for place, path in enumerate(resnets)}  # the last skip is read first
        read = [SkipSite(**vars(site), number=behind[site.module_path], skips=skips) for site in sites]
        found[root] = sorted(read, key=lambda site: -site.number)
    return found


def _skips(surgeon: Surgeon, root: str) -> list[Skip]:
    """Return the skips of the encoder: the outputs of its first convolution, of each resnet and of each downsampler."""
    modules, widths = surgeon.resolver.modules, _widths(surgeon)
    skips = [Skip(widths.get(f"{root}conv_in", (0, 0))[0], False)]
    for block in _numbered(surgeon, f"{root}down_blocks"):
        for resnet in _numbered(surgeon, f"{block}.resnets"):
            skips.append(Skip(widths.get(f"{resnet}.conv2", (0, 0))[0], False))
        skips += [Skip(skips[-1].width, True)] if f"{block}.downsamplers" in modules else []
    return skips


def _decoder(surgeon: Surgeon, root: str) -> list[str]:
    """Return the paths of the decoder's resnets, in the order in which they run."""
    blocks = _numbered(surgeon, f"{root}up_blocks")
    return [resnet for block in blocks for resnet in _numbered(surgeon, f"{block}.resnets")]


def _check(surgeon: Surgeon, root: str, skips: tuple[Skip, ...], resnets: list[str]) -> None:
    widths = _widths(surgeon)
    middle = _numbered(surgeon, f"{root}mid_block.resnets")
    before = [widths.get(f"{path}.conv2", (0, 0))[0] for path in [*middle[-1:], *resnets[:-1]]]
    before = before if middle else [skips[-1].width, *before]
    wanted = [width + skip.width for width, skip in zip(before, reversed(skips), strict=False)]
    if len(skips) != len(resnets) or wanted != [widths.get(f"{path}.conv1", (0, 0))[1] for path in resnets]:
        raise UnsupportedSite(f"{root}up_blocks does not read {len(skips)} skip connections, one in each resnet")


def _widths(surgeon: Surgeon) -> dict[str, tuple[int, int]]:
    """Return the numbers of output and of input channels of each convolution of the host, by path."""
    entries = surgeon.resolver.host.entries
    return {entry.module: (entry.shape[0], entry.shape[1]) for entry in entries if len(entry.shape) == 4}


def _numbered(surgeon: Surgeon, stack: str) -> list[str]:
    """Return the paths of the modules in a ``ModuleList``, in the order of their numbers."""
    numbers = (re.fullmatch(rf"{re.escape(stack)}\.(\d+)", path) for path in surgeon.resolver.modules)
    return [f"{stack}.{number}" for number in sorted(int(each[1]) for each in numbers if each)]


class SCTuner(Operator):
    """Changes the skip that one resnet reads. With an image, the first operator that runs computes the features c_i of
    all skips."""

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
                f"{self.name} has size {list(hint.shape[-2:])} after its network, but the UNet's skip connection has "
                f"{list(skip.shape[-2:])}: resize the image to {self.times} times the latents"
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
        peftcore.call(model, condition=torch.rand(1, 3, 64, 64))  # 8 times as large as the latents
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
        for root, sites in skip_sites(surgeon).items():
            hints, shared = Tap(until_backward=True), None
            if config.channels is not None:
                seen = sites[0].skips[: sites[0].number + 1]  # none of what is left out
                make = functools.partial(Hints, seen, config.channels, config.widths, config.kernel)
                shared = surgeon.own(f"hints_{root}", make)
            for site in sites:
                operator = surgeon.graft(site, SCTuner, config, shared=shared, hints=hints)
                operator.first = site is sites[0]

    @staticmethod
    def parameter_count(site: Site, config: SCEditConfig) -> int:
        assert isinstance(site, SkipSite)
        width, inside = site.width, _inside(site, config)
        return 2 * width * inside + inside + width


def _inside(site: SkipSite, config: SCEditConfig) -> int:
    """Return the width inside a tuner."""
    return max(1, int(config.ratio * site.width))


class Hints(nn.Module):
    """Maps an image to the features c_i, one for each skip. The image is 2^(len(widths) - 1) times as large as the
    UNet's input."""

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
        """Return the features c_i of an image, in the order of the skips."""
        hints: list[Tensor] = [self.first(image.to(next(self.first.parameters()).dtype))]
        for layer in self.cascade:
            hints.append(layer(torch.nn.functional.silu(hints[-1])))
        return hints[1:]
