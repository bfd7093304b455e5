"""ControlNet-LLLite: small networks that change the inputs of attention to follow an image.   Kohya S. 2023,
kohya-ss/sd-scripts.

Equation:
    y = W (x + scale * (U relu(M [e; relu(D x + d)] + m) + u)) + b,   e = relu-convolutions of the image, at x's places

The equation applies to the matrices of attention that read the latents, in a UNet's encoder and middle block: queries,
keys and values of self-attention, and queries of cross-attention. x is [tokens, in], e [tokens, condition_dim], D
[hidden, in], M [hidden, condition_dim + hidden], U [in, hidden]. Each matrix has a separate network and separate
convolutions. The first convolution is 4x4 with stride 4, and has condition_dim / 2 channels. One or two further
convolutions reduce the image to the grid of the matrix's tokens. Their strides depend on how often the UNet halved the
resolution of the latents: 2 for no halving, 4 for one, 4 and 2 for two. Matrices after more than two halvings are not
supported; in Stable Diffusion 1.5 exclude the middle block.

Pass the image to a call: ``with peftcore.call(model, condition=image): ...``. Its shape is [batch or 1, channels,
height, width], 8 times as large as the latents, with values in [-1, 1]. ``condition_scale=`` in the same call replaces
`scale`. The option `input` sets another name for the image.

The method cannot be merged. Parameters of a matrix, with h = hidden, c = condition_dim and k = c / 2: the network has h
(2 in + h + c + 2) + in. The first convolution has 16 channels k + k, and the further ones together have 4 k c + c, 16 k
c + c, or 16 k^2 + k + 4 k c + c for no, one or two halvings.

Start: U starts at zero, but u like the biases of torch's layers. The start is an identity only with a scale of 0.

Differs from the authors' code: The authors' code computes e once for each image; here each forward does.

Use it: `peftcore.apply(model, "controlnet_lllite")`, for control on SDXL where a ControlNet is too large; not to learn
a style, for which it is too small. The similar t2i_adapter adds features to whole blocks.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, MethodConfig, Operator, Share, Site, Surgeon, Tags, forward_context
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore_diffusion._told import told

STRIDES = ((4, 2), (4, 4), (4, 4, 2))
"""Strides of the convolutions, indexed by how many times the latents were halved."""


class ControlNetLLLiteConfig(MethodConfig):
    """Options of ControlNet-LLLite."""

    method: Literal["controlnet_lllite"] = "controlnet_lllite"
    scale: NonNegativeFloat = 1.0
    """The factor on the networks' outputs, unless a call passes ``condition_scale=``."""
    condition_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 16
    """Number of features of the image at each token."""
    hidden: PositiveInt = 16
    """Width of the hidden layers of a network."""
    channels: PositiveInt = 3
    """Channels of the condition image."""
    dropout: Share = 0.0
    """Probability with which hidden values are dropped in training."""
    input: str = "condition"
    """The name under which calls pass the image: ``peftcore.call(model, condition=image)`` by default."""


@dataclasses.dataclass(frozen=True, eq=False)
class LLLiteSite(Site):
    """A matrix of attention as a site, with the number of times that the resolution of its input was halved."""

    halved: int = dataclasses.field(kw_only=True)


class LLLiteOperator(Operator):
    """Adds the output of a small network to the inputs of one matrix."""

    changes_inputs, only_inputs = True, True

    def __init__(self, site: LLLiteSite, config: ControlNetLLLiteConfig) -> None:
        super().__init__(site)
        self.name, self.scale, self.dropout = config.input, config.scale, config.dropout
        strides = STRIDES[site.halved]
        widths = [config.channels, *[config.condition_dim // 2] * (len(strides) - 1), config.condition_dim]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(narrow, wide, stride, stride)
            for (narrow, wide), stride in zip(itertools.pairwise(widths), strides, strict=True)
        )
        self.down = nn.Linear(site.in_features, config.hidden)
        self.mid = nn.Linear(config.condition_dim + config.hidden, config.hidden)
        self.up = nn.Linear(config.hidden, site.in_features)
        nn.init.zeros_(self.up.weight)

    def forward(self, call: Callable[..., Any], x: Tensor) -> Any:
        scale = forward_context().context.get(f"{self.name}_scale", self.scale)
        inside = torch.relu(self.down(x.to(self.down.weight.dtype)))
        hidden = torch.relu(self.mid(torch.cat([self._embedded(x), inside], -1)))
        if self.training and self.dropout:
            hidden = nn.functional.dropout(hidden, self.dropout)
        return call(x + (scale * self.up(hidden)).to(x.dtype))

    def _embedded(self, x: Tensor) -> Tensor:
        """Return the features e of the image at the position of each token, [batch, tokens, condition_dim]."""
        image = told(self.name, len(x)).to(self.down.weight.dtype)
        for number, convolution in enumerate(self.convolutions):
            image = convolution(torch.relu(image) if number else image)
        embedded = image.flatten(2).transpose(1, 2)  # [batch, tokens, condition_dim]
        if embedded.shape[1] != x.shape[1]:
            raise ConfigError(
                f"{self.name} has {embedded.shape[1]} positions after its network, but a matrix gets {x.shape[1]} "
                "tokens: resize the image to 8 times the latents, whose sides must be multiples of the UNet's total "
                "downsampling"
            )
        return embedded


class ControlNetLLLite(Method):
    """Small networks that change the inputs of attention to follow an image.

    Example:
        injection = peftcore.apply(model, "controlnet_lllite", hidden=64, condition_dim=32)
        peftcore.call(model, condition=torch.rand(1, 3, 64, 64))  # 8 times as large as the latents
    """

    name = "controlnet_lllite"
    Config = ControlNetLLLiteConfig
    tags = Tags(
        category="diffusion", paper="kohya-ss/sd-scripts", identity_at_init=False, identity_options={"scale": 0.0}
    )
    learning_rate = LearningRate(
        2e-4, "kohya-ss/sd-scripts@48d368f, docs/train_lllite_README.md", on="SDXL, edges of Canny"
    )
    target = (r"re:(.*\.)?(down_blocks\.\d+|mid_block)\..*\.(attn1\.to_[qkv]|attn2\.to_q)",)

    def inject(self, model: nn.Module, config: ControlNetLLLiteConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(LLLiteSite(**vars(site), halved=_halved(surgeon, site)), LLLiteOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: ControlNetLLLiteConfig) -> int:
        assert isinstance(site, LLLiteSite)
        wide, hidden, width = config.condition_dim, config.hidden, site.in_features
        half = wide // 2
        kernels = (4 * half * wide, 16 * half * wide, 16 * half**2 + half + 4 * half * wide)
        convolutions = 16 * config.channels * half + half + kernels[site.halved] + wide
        return hidden * (2 * width + hidden + wide + 2) + width + convolutions


def _halved(surgeon: Surgeon, site: Site) -> int:
    """Return how many times the UNet halved the latents before a matrix reads them."""
    found = re.fullmatch(r"((?:.*\.)?)(?:down_blocks\.(\d+)|mid_block)\..*", site.module_path)
    if found is None or site.form != "activation" or len(site.weight_shape) != 2:
        raise UnsupportedSite(f"{site.path or 'the host'} is not a matrix in the encoder or the middle block of a UNet")
    halving = re.compile(rf"{re.escape(found[1])}down_blocks\.(\d+)\.downsamplers")
    levels = [int(each[1]) for path in surgeon.resolver.modules if (each := halving.fullmatch(path))]
    halved = sum(found[2] is None or level < int(found[2]) for level in levels)
    if halved >= len(STRIDES):
        raise UnsupportedSite(
            f"{site.path} reads latents that were halved {halved} times, and there are networks for at most "
            f"{len(STRIDES) - 1}: exclude it"
        )
    return halved
