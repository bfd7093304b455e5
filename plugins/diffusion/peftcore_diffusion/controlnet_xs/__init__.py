"""ControlNet-XS: a thin encoder that exchanges features with a UNet's, layer by layer.   Zavadski et al. 2023, arXiv
2312.06573.

Equation:
    g_0 = conv(x) + H(image),   g_i = G_i([g_(i-1); P_i h_(i-1)]),   h_i <- h_i + scale * Q_i g_i     in the encoder
    h <- h + scale * R_i g_i,   where the decoder reads skip i: added to what comes from below, not to the skip

h_i is the output of layer i of the UNet's encoder or of its middle block, G_i a layer of the same kind that is `ratio`
times as wide; P_i, Q_i and R_i are 1x1 convolutions, H is eight convolutions. The base stays frozen. Pass the image to
a call: ``with peftcore.call(model, condition=image): ...``. Its shape is [batch or 1, channels, height, width]; with
four `widths` it is 8 times as large as the latents. ``condition_scale=`` in the same call replaces `scale`. If several
adapters read different images, set another name for each image with the option `input`.

Tensors are named as in diffusers' ControlNetXSAdapter, so a published adapter of the same sizes can be loaded into the
network. The UNet must be a UNet2DConditionModel whose attentions and middle block are those of Stable Diffusion. The
thin encoder uses the UNet's embedding of the timestep. If the UNet uses FreeU, R_i g_i is added after FreeU's change.
The method cannot be merged.

Parameters: those of the thin encoder, whose layers read g and h together, and those of H. Each layer that reads b
channels of h and c channels of g adds b^2 + b + c b + b, and each skip adds c b + b.

Start: G at random, P_i, Q_i, R_i and the last convolution of H at zero: the identity. The first step changes only Q and
R.

Differs from the authors' code: The authors' code was not compared. Outputs are compared with diffusers, whose trained
embedding of the timestep is not implemented here.

Use it: `peftcore.apply(model, "controlnet_xs")`, for control of single pixels with a fraction of the parameters of the
similar `controlnet`; not where a published ControlNet for the condition exists already.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, MethodConfig, Shared, Site, Surgeon, Tags, Tap, on_first
from peftcore.errors import ConfigError
from peftcore_diffusion._told import told
from peftcore_diffusion.controlnet_xs.controller import Controller, Exchange, XSOperator, controlled


class ControlNetXSConfig(MethodConfig):
    """Options of ControlNet-XS."""

    overridable = ()

    method: Literal["controlnet_xs"] = "controlnet_xs"
    scale: NonNegativeFloat = 1.0
    """The factor on the controls, unless a call passes ``condition_scale=``."""
    ratio: PositiveFloat = 0.2
    """The widths of the thin encoder, as a fraction of the UNet's."""
    heads: PositiveInt | None = None
    """Number of heads in the thin encoder's attentions; None: as many as in the UNet, at most one for each channel."""
    channels: PositiveInt = 3
    """Channels of the condition image."""
    widths: list[PositiveInt] = Field(default_factory=lambda: [16, 32, 96, 256], min_length=1)
    """Channels of the convolutions that read the image. Each width after the first halves the resolution."""
    input: str = "condition"
    """The name under which calls pass the image: ``peftcore.call(model, condition=image)`` by default."""


class StartOperator(XSOperator):
    """Runs the first convolution of the thin encoder, and adds the image's features."""

    def __init__(self, site: Site, config: ControlNetXSConfig, network: Shared, after: Tap) -> None:
        super().__init__(site, network, config.input, config.scale)
        self.after = after

    def forward(self, call: Callable[..., Any], sample: Tensor) -> Any:
        features = self.part("conv_in", sample)
        image = self.part("controlnet_cond_embedding", told(self.name, len(sample)))
        if image.shape[-2:] != features.shape[-2:]:
            raise ConfigError(
                f"{self.name} has size {list(image.shape[-2:])} after its network, but the latents have size "
                f"{list(features.shape[-2:])}: resize the image"
            )
        features = features + image
        self.after.put(features)
        return self.added("control_to_base_for_conv_in", features, call(sample))


class ExchangeOperator(XSOperator):
    """Runs the thin encoder's layer in parallel with a layer of the UNet's encoder or with the middle block."""

    def __init__(
        self, site: Site, config: ControlNetXSConfig, network: Shared, what: Exchange, before: Tap, after: Tap
    ) -> None:
        super().__init__(site, network, config.input, config.scale)
        self.what, self.before, self.after = what, before, after

    def forward(self, call: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        features = self.before.get()
        if self.what.reads is not None:
            features = torch.cat([features, self.part(self.what.reads, hidden)], 1)
        made = self.part(self.what.layer, features, *args, **kwargs)
        made = made[0] if isinstance(made, tuple) else made
        self.after.put(made)
        output, path = call(hidden, *args, **kwargs), self.what.adds
        return output if path is None else on_first(output, lambda to: self.added(path, made, to))


class SkipOperator(XSOperator):
    """Adds the control to one part of a decoder resnet's input, the previous layer's output. The other part, the skip,
    is unchanged."""

    changes_inputs, only_inputs = True, True

    def __init__(self, site: Site, config: ControlNetXSConfig, network: Shared, path: str, skip: Tap) -> None:
        super().__init__(site, network, config.input, config.scale)
        self.path, self.skip = path, skip
        self.width = network.module.get_submodule(path).out_channels

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        below, skip = x.split([self.width, x.shape[1] - self.width], 1)
        return call(torch.cat([self.added(self.path, self.skip.get(), below), skip], 1), *args, **kwargs)


class ControlNetXS(Method):
    """A thin encoder that exchanges features with the UNet's encoder.

    Example:
        injection = peftcore.apply(model, "controlnet_xs")
        peftcore.call(model, condition=torch.rand(1, 3, 64, 64))  # 8 times as large as the latents
    """

    name = "controlnet_xs"
    Config = ControlNetXSConfig
    tags = Tags(category="diffusion", paper="2312.06573", reentrant=False)
    learning_rate = LearningRate(
        1e-5,
        "vislearn/ControlNet-XS@8d90ed4, configs/training/sd/sd15_encD_canny_53m.yaml",
        on="Stable Diffusion 1.5, edges of Canny",
    )
    target = (r"re:(.*\.)?mid_block",)

    def inject(self, model: nn.Module, config: ControlNetXSConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            root, unet = controlled(surgeon, site)
            sizes = config.ratio, config.heads, config.channels, config.widths
            network = surgeon.own(f"control_{root}", functools.partial(Controller, unet, *sizes))
            self._talk(surgeon, site, config, root, network)

    @staticmethod
    def _talk(surgeon: Surgeon, middle: Site, config: ControlNetXSConfig, root: str, network: Shared) -> None:
        def graft(layer: str, operator: Callable[..., XSOperator], **own: Any) -> None:
            site = dataclasses.replace(surgeon.resolver.module_site(f"{root}{layer}"), meta=middle.meta)
            surgeon.graft(site, operator, config, network=network, **own)

        features = Tap(until_backward=True, learns=True)
        left = [features]  # for the decoder
        graft("conv_in", StartOperator, after=features)
        for what in network.module.exchanges():
            after = Tap(until_backward=True, learns=True)
            graft(what.at, ExchangeOperator, what=what, before=features, after=after)
            left += [] if what.adds is None else [after]
            features = after
        left.pop()  # of the middle block
        for number, block in enumerate(network.module.up_connections):
            for each in range(len(block["ctrl_to_base"])):
                path = f"up_connections.{number}.ctrl_to_base.{each}"
                graft(f"up_blocks.{number}.resnets.{each}", SkipOperator, path=path, skip=left.pop())

    @staticmethod
    def parameter_count(site: Site, config: ControlNetXSConfig) -> int:
        return 0  # the network belongs to no layer
