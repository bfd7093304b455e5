"""ControlNet: a trainable copy of a UNet's encoder.   Zhang et al. 2023, arXiv 2302.05543.

    c_i = Z_i(E'_i(conv_in'(x) + H(image), t, text)),   skip_i <- skip_i + scale * c_i,   mid <- mid + scale * c_mid

E' starts as the encoder and the middle block of the base, Z_i are 1x1 convolutions that start at zero, H is eight
convolutions of which the last starts at zero: a fresh injection changes nothing, and its first step moves the Z_i
alone. The base stays frozen, decoder included (sd_locked of lllyasviel/ControlNet). The image comes with the call,
``with peftcore.call(model, condition=image): ...``, [batch or 1, channels, height, width], 8 times as large as the
latents with four `widths`; the option `input` gives it another name, where several act, and ``condition_scale=`` in a
call takes the place of `scale`. `guess_mode` lets the controls count less the shallower they are, from 0.1 on.

The copy is diffusers' ControlNetModel with the weights of this UNet, so a published one of the same sizes can be
loaded into it; the UNet is a UNet2DConditionModel. Rows of a batch cannot go to different injections: the controls
enter whole blocks of the decoder.

Parameters: those of the encoder and the middle block, H, and c_i^2 + c_i for each skip of c_i channels.

Use it for control to the pixel, with tens of thousands of images. It cannot be merged.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore import LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags, Tap, forward_context
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore_diffusion._encoder_copy import GIVEN, Copy, InputsOperator, encoder_copy
from peftcore_diffusion._told import cast, told


class Config(MethodConfig):
    """Options of ControlNet."""

    method: Literal["controlnet"] = "controlnet"
    scale: NonNegativeFloat = 1.0
    """By how much the controls count, where the call says nothing else."""
    guess_mode: bool = False
    """Let shallow controls count less than deep ones: for sampling without a prompt."""
    channels: PositiveInt = 3
    """Channels of the condition image."""
    widths: list[PositiveInt] = Field(default_factory=lambda: [16, 32, 96, 256], min_length=1)
    """Channels inside H; all but the first halve the resolution."""
    input: str = "condition"
    """The name under which calls give the image."""


class ControlNetOperator(Operator):
    """Adds the controls of one block; the first block that runs computes all of them."""

    def __init__(self, site: Site, config: Config, skips: slice | None, copy: Copy) -> None:
        super().__init__(site)
        self.skips, self.copy, self.first = skips, copy, False
        self.name, self.scale, self.guess_mode = config.input, config.scale, config.guess_mode

    def forward(self, call: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.first:
            self.copy.controls.put(self._compute(len(hidden)))
        down, mid = self.copy.controls.get()
        if self.skips is None:
            output: Tensor = call(hidden, *args, **kwargs)
            return output + mid.to(output.dtype)
        states = zip(kwargs.pop("res_hidden_states_tuple"), down[self.skips], strict=True)
        skips = tuple(state + control.to(state.dtype) for state, control in states)
        return call(hidden, *args, res_hidden_states_tuple=skips, **kwargs)

    def _compute(self, rows: int) -> Any:
        """Run the copy on the model's own inputs and the image."""
        here, network = forward_context(), self.copy.network.module
        inputs = here.inputs if self.copy.inputs is None else self.copy.inputs.get()
        like: Tensor = network.conv_in.weight
        return network(
            **{name: cast(inputs.get(name), like) for name in GIVEN},
            controlnet_cond=cast(told(self.name, rows), like),
            conditioning_scale=here.context.get(f"{self.name}_scale", self.scale),
            guess_mode=self.guess_mode,
            return_dict=False,
        )


class ControlNet(Method):
    """A trainable copy of the encoder, whose features control the decoder.

    Example:
        injection = peftcore.apply(model, "controlnet")
        peftcore.call(model, condition=torch.rand(1, 3, 64, 64))  # 8 times the latents; with `with`, for a while
    """

    name = "controlnet"
    Config = Config
    tags = Tags(category="diffusion", paper="2302.05543", per_row=False)
    learning_rate = LearningRate(
        1e-5, "lllyasviel/ControlNet@ed85cd1, tutorial_train.py", on="Stable Diffusion 1.5, Fill50K"
    )
    target = (r"re:(.*\.)?mid_block", r"re:(.*\.)?up_blocks\.\d+")

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        if any(config.overrides.values()):
            raise ConfigError("controlnet has one network for all blocks: it takes no overrides")
        copies: dict[str, Copy] = {}
        sizes = tuple(config.widths), config.channels
        places = [(_unet(surgeon, site), _skips(surgeon, site), site) for site in surgeon.sites()]
        for unet, skips, site in sorted(places, key=lambda place: place[1] is not None):  # as they run
            first = unet not in copies
            if first:
                module = surgeon.resolver.modules[unet]
                network = surgeon.own(f"control_{unet}", lambda module=module: encoder_copy(surgeon, module, *sizes))
                copies[unet] = Copy(network, Tap(until_backward=True) if unet else None)
                if unet:
                    at = dataclasses.replace(surgeon.resolver.module_site(unet), meta=site.meta)
                    surgeon.graft(at, lambda at, tap=copies[unet].inputs: InputsOperator(at, tap))
            parts = skips, copies[unet]
            surgeon.graft(site, lambda at, parts=parts: ControlNetOperator(at, config, *parts)).first = first

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        return 0  # the copy belongs to no block


def _unet(surgeon: Surgeon, site: Site) -> str:
    """Return the path of the UNet around a block."""
    found = re.fullmatch(r"(?:(.*)\.)?(?:mid_block|up_blocks\.\d+)", site.module_path)
    path, diffusers = (found[1] or "") if found else None, sys.modules.get("diffusers")
    if diffusers and path is not None and isinstance(surgeon.resolver.modules[path], diffusers.UNet2DConditionModel):
        return path
    raise UnsupportedSite(
        f"{site.path or 'the host'} is neither the middle block nor one of the decoder in a UNet2DConditionModel"
    )


def _skips(surgeon: Surgeon, site: Site) -> slice | None:
    """Return the slice of the skips, first to last, that go into a block of the decoder; None for the middle block."""
    stack, _, number = site.module_path.rpartition(".")
    if not number.isdecimal():
        return None
    paths = (re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.resnets\.\d+", path) for path in surgeon.resolver.modules)
    resnets = [int(path[1]) for path in paths if path]
    behind = sum(each > int(number) for each in resnets)
    return slice(behind, behind + resnets.count(int(number)))
