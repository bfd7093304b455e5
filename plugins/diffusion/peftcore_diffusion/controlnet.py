"""ControlNet: a trainable copy of a UNet's encoder.   Zhang et al. 2023, arXiv 2302.05543.

Equation:
    c_i = Z_i(E'_i(conv_in'(x) + H(image), t, text)),   skip_i <- skip_i + scale * c_i,   mid <- mid + scale * c_mid

E' is a trained copy of the encoder and the middle block of the base, Z_i are 1x1 convolutions, H is eight convolutions.
The base stays frozen, decoder included (sd_locked of lllyasviel/ControlNet). Pass the image to a call: ``with
peftcore.call(model, condition=image): ...``. Its shape is [batch or 1, channels, height, width]; with four `widths` it
is 8 times as large as the latents. ``condition_scale=`` in the same call replaces `scale`. If several adapters read
different images, set another name for each image with the option `input`. `guess_mode` multiplies the controls by
factors that rise from 0.1 for the shallowest to 1 for the deepest.

The copy is diffusers' ControlNetModel with the weights of this UNet, so a published ControlNet of the same sizes can be
loaded into the copy. The UNet must be a UNet2DConditionModel. The method cannot be merged. Rows of a batch cannot be
routed to different injections, since the controls are added in whole blocks of the decoder.

Parameters: those of the encoder and the middle block, H, and c_i^2 + c_i for each skip of c_i channels.

Start: E' at the weights of the base, Z_i and the last convolution of H at zero: the identity. The first step changes
only the Z_i.

Differs from the authors' code: The authors' code was not compared. No difference from diffusers is known.

Use it: `peftcore.apply(model, "controlnet")`, for control of single pixels, with tens of thousands of training images.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import nn

from peftcore.author import LearningRate, Method, MethodConfig, Site, Surgeon, Tags
from peftcore_diffusion._encoder_copy import control, encoder_copy


class ControlNetConfig(MethodConfig):
    """Options of ControlNet."""

    overridable = ()

    method: Literal["controlnet"] = "controlnet"
    scale: NonNegativeFloat = 1.0
    """The factor on the controls, unless a call passes ``condition_scale=``."""
    guess_mode: bool = False
    """Scale the controls of shallow layers down, for sampling without a prompt."""
    channels: PositiveInt = 3
    """Channels of the condition image."""
    widths: list[PositiveInt] = Field(default_factory=lambda: [16, 32, 96, 256], min_length=1)
    """Channels of the convolutions that read the image. Each width after the first halves the resolution."""
    input: str = "condition"
    """The name under which calls pass the image: ``peftcore.call(model, condition=image)`` by default."""


class ControlNet(Method):
    """A trainable copy of the encoder, whose features control the decoder.

    Example:
        injection = peftcore.apply(model, "controlnet")
        peftcore.call(model, condition=torch.rand(1, 3, 64, 64))  # 8 times as large as the latents
    """

    name = "controlnet"
    Config = ControlNetConfig
    tags = Tags(category="diffusion", paper="2302.05543", per_row=False)
    learning_rate = LearningRate(
        1e-5, "lllyasviel/ControlNet@ed85cd1, tutorial_train.py", on="Stable Diffusion 1.5, Fill50K"
    )
    target = (r"re:(.*\.)?mid_block", r"re:(.*\.)?up_blocks\.\d+")

    def inject(self, model: nn.Module, config: ControlNetConfig, surgeon: Surgeon) -> None:
        sizes = tuple(config.widths), config.channels
        control(surgeon, config, lambda unet, _: encoder_copy(surgeon, unet, *sizes))

    @staticmethod
    def parameter_count(site: Site, config: ControlNetConfig) -> int:
        return 0  # the copy belongs to no block
