"""Control-LoRA: a ControlNet whose encoder is the UNet's own with low-rank updates.   stabilityai/control-lora, 2023.

Equation:
    c_i = Z_i(E'_i(conv_in'(x) + H(image), t, text)),   skip_i <- skip_i + scale * c_i,   mid <- mid + scale * c_mid
    W' = W + up down   for each matrix and convolution W of E' and the middle block

As in `controlnet`, Z_i are 1x1 convolutions and H is eight convolutions. W is the UNet's own tensor, read when the
encoder runs, so neither memory nor the file contains a second copy. Other adapters of the UNet do not act in E', except
merged ones, which are part of W. The rank of a layer is at most the smaller of its numbers of inputs and outputs.
Biases and norms of E' train too, and Stability's files store them whole. With ``vectors=False`` E' uses the biases and
norms of the UNet, as in HighCWu/control-lora-v2. ``peftcore.load`` reads Stability's files, and ``injection.save`` with
``format="control_lora"`` writes them.

Pass the image to a call: ``with peftcore.call(model, condition=image): ...``. Its shape is [batch or 1, channels,
height, width]; with four `widths` it is 8 times as large as the latents. ``condition_scale=`` in the same call replaces
`scale`. If several adapters read different images, set another name for each image with the option `input`.
`guess_mode` multiplies the controls by factors that rise from 0.1 for the shallowest to 1 for the deepest. The UNet
must be a UNet2DConditionModel. Rows of a batch cannot be routed to different injections. The method cannot be merged.

Parameters: rank (in k^2 + out) + out for each matrix or convolution with a kernel k x k, 2 c for each norm of c
channels, c_i^2 + c_i for each skip of c_i channels, and those of H.

Start: up, Z_i and the last convolution of H at zero: the identity.

Differs from the authors' code: The authors' code was not compared. No difference from diffusers is known.

Use it: `peftcore.apply(model, "controlnet_lora")`, for control of single pixels where a whole `controlnet` is too large
for memory or files; not with few training images. `controlnet_xs` is another small method, whose encoder starts at
random.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import nn

from peftcore.author import LearningRate, Method, MethodConfig, Site, Surgeon, Tags
from peftcore_diffusion._encoder_copy import borrowed_encoder, control


class ControlNetLoRAConfig(MethodConfig):
    """Options of Control-LoRA."""

    overridable = ()

    method: Literal["controlnet_lora"] = "controlnet_lora"
    rank: PositiveInt = 128
    """Rank of the updates."""
    vectors: bool = True
    """Train biases and norms of the second encoder, too."""
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


class ControlNetLoRA(Method):
    """Features of a second encoder control the decoder; it reuses the UNet's layers, with low-rank updates.

    Example:
        injection = peftcore.apply(model, "controlnet_lora", rank=128)
        peftcore.call(model, condition=torch.rand(1, 3, 64, 64))  # 8 times as large as the latents
    """

    name = "controlnet_lora"
    Config = ControlNetLoRAConfig
    tags = Tags(category="diffusion", paper="stabilityai/control-lora", per_row=False)
    learning_rate = LearningRate(
        1e-4, "HighCWu/control-lora-v2@4b7247a, train/tutorial.py", on="Stable Diffusion 1.5, Fill50K"
    )
    target = (r"re:(.*\.)?mid_block", r"re:(.*\.)?up_blocks\.\d+")

    def inject(self, model: nn.Module, config: ControlNetLoRAConfig, surgeon: Surgeon) -> None:
        sizes = tuple(config.widths), config.channels, config.rank, config.vectors
        control(surgeon, config, lambda unet, lender: borrowed_encoder(surgeon, unet, lender, *sizes), borrows=True)

    @staticmethod
    def parameter_count(site: Site, config: ControlNetLoRAConfig) -> int:
        return 0  # the network belongs to no layer
