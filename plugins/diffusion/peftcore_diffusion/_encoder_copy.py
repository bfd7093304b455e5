"""The trainable copy of a UNet's encoder, and the operator that hands the UNet's inputs to it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peftcore import Operator, Shared, Site, Surgeon, Tap

GIVEN = ("sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs")
"""The inputs of the UNet that the copy gets."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """The copy of one UNet's encoder, and the inputs and outputs that its operators share."""

    network: Shared
    inputs: Tap | None
    """The inputs of the UNet; None where it is the host, whose inputs are known."""
    controls: Tap = dataclasses.field(default_factory=lambda: Tap(until_backward=True))


class InputsOperator(Operator):
    """Stores the inputs of a UNet inside a model, for the copy."""

    def __init__(self, site: Site, inputs: Tap) -> None:
        super().__init__(site)
        self.names, self.inputs = tuple(inspect.signature(site.module.forward).parameters), inputs

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.inputs.put({**dict(zip(self.names, args, strict=False)), **kwargs})
        return call(*args, **kwargs)


def encoder_copy(surgeon: Surgeon, model: Any, widths: tuple[int, ...], channels: int) -> nn.Module:
    """Make a ControlNet with the weights of a UNet."""
    import diffusers

    copy: nn.Module = diffusers.ControlNetModel.from_unet(
        model,
        conditioning_embedding_out_channels=widths,
        conditioning_channels=channels,
        load_weights_from_unet=False,  # that knows no host with other adapters in it
    )
    own, layer_of = dict(model.named_modules()), surgeon.resolver.layer_of
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            path, _, tensor = name.rpartition(".")
            held = layer_of(own[path], tensor).read(own[path], tensor) if path in own else None  # quantized or not
            if held is not None:
                parameter.copy_(held)
    return copy
