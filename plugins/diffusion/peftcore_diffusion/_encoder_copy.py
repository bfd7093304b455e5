"""A second encoder for a UNet, either a trained copy or one that reuses the UNet's own layers, and the operators
through which its features control the decoder."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftcore.author import BorrowedLayer, Operator, Shared, Site, Surgeon, Tap, borrow, forward_context, with_tensors
from peftcore.errors import NoWeights, UnsupportedSite
from peftcore_diffusion._told import cast, told

GIVEN = ("sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs")
"""Names of the UNet's inputs that the second encoder receives."""


class Options(Protocol):
    """The common options of methods with a second encoder."""

    scale: float
    guess_mode: bool
    input: str


@dataclasses.dataclass(frozen=True)
class Copy:
    """The second encoder of one UNet, and the inputs and outputs that its operators share."""

    network: Shared
    inputs: Tap | None
    """The inputs of the UNet; None if the UNet is the host itself, whose inputs are in the forward context."""
    lender: Tap | None
    """The UNet, if the second encoder reuses its layers."""
    controls: Tap = dataclasses.field(default_factory=lambda: Tap(until_backward=True))

    def ready(self, sample: Tensor) -> tuple[nn.Module, Tensor]:
        """Return the network, and a tensor with the dtype in which it computes. If the network reuses the UNet's
        layers, that is the dtype of the sample and of the UNet; otherwise it is the network's own dtype.

        Raises:
            NoWeights: weights have to be cast, but they are offloaded.
        """
        network = self.network.module
        if self.lender is None:
            like: Any = network.conv_in
            return network, like.weight
        own = dict(network.named_parameters())
        if any(each.dtype is not sample.dtype for each in own.values()):
            if any(each.is_meta for each in own.values()) and not sample.is_meta:
                raise NoWeights(
                    f"the adapter uses the UNet's offloaded layers, which would have to be cast to {sample.dtype}: "
                    "apply it with dtype= of the UNet, or offload whole models"
                )
            network = with_tensors(network, {name: each.to(sample.dtype) for name, each in own.items()})
        return network, sample


class InputsOperator(Operator):
    """Stores the inputs of a UNet for the second encoder, and the UNet itself if that encoder reuses its layers."""

    observes = frozenset({"activation"})

    def __init__(self, site: Site, copy: Copy) -> None:
        super().__init__(site)
        self.names, self.copy = tuple(inspect.signature(site.module.forward).parameters), copy
        if copy.lender is not None:
            lent = [each.path for each in copy.network.module.modules() if isinstance(each, BorrowedLayer)]
            self.reads_from_base = frozenset(
                f"{site.module_path}.{path}.{name}".lstrip(".") for path in lent for name in ("weight", "bias")
            )

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        def around(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.copy.inputs is not None:
                self.copy.inputs.put({**dict(zip(self.names, args, strict=False)), **kwargs})
            if self.copy.lender is not None:
                self.copy.lender.put(module)
            return call(*args, **kwargs)

        return around


class ControlsOperator(Operator):
    """Adds the controls of one block; the first block that runs computes the controls of all blocks."""

    def __init__(self, site: Site, config: Options, skips: slice | None, copy: Copy) -> None:
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
        here = forward_context()
        inputs = here.inputs if self.copy.inputs is None else self.copy.inputs.get()
        network, like = self.copy.ready(inputs["sample"])
        return network(
            **{name: cast(inputs.get(name), like) for name in GIVEN},
            controlnet_cond=cast(told(self.name, rows), like),
            conditioning_scale=here.context.get(f"{self.name}_scale", self.scale),
            guess_mode=self.guess_mode,
            return_dict=False,
        )


def control(surgeon: Surgeon, config: Any, make: Callable[[Any, Tap], nn.Module], borrows: bool = False) -> None:
    """Install a second encoder for each UNet; it controls the decoder blocks that are targets.

    Args:
        surgeon: the object with which the method installs operators.
        config: the method's options, a subclass of `Options`.
        make: a function of the UNet and a tap that makes the second encoder. If the encoder reuses layers, the tap
            contains the UNet during a forward.
        borrows: True if the encoder reuses the UNet's layers.

    Raises:
        UnsupportedSite: a target module is not a block after the encoder of a UNet.
    """
    copies: dict[str, Copy] = {}
    places = [(_unet(surgeon, site), _skips(surgeon, site), site) for site in surgeon.sites()]
    for unet, skips, site in sorted(places, key=lambda place: place[1] is not None):  # as they run
        first = unet not in copies
        if first:
            module, lender = surgeon.resolver.modules[unet], Tap(until_backward=True)
            network = surgeon.own(f"control_{unet}", functools.partial(make, module, lender))
            inputs = Tap(until_backward=True) if unet or borrows else None
            copies[unet] = Copy(network, inputs, lender if borrows else None)
            if inputs is not None:
                at = dataclasses.replace(surgeon.resolver.module_site(unet), meta=site.meta)
                surgeon.graft(at, InputsOperator, copy=copies[unet])
        surgeon.graft(site, ControlsOperator, config, skips=skips, copy=copies[unet]).first = first


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
    """Return which skips a decoder block reads, as a slice of the skips in the order of the encoder; None for the
    middle block."""
    stack, _, number = site.module_path.rpartition(".")
    if not number.isdecimal():
        return None
    paths = (re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.resnets\.\d+", path) for path in surgeon.resolver.modules)
    resnets = [int(path[1]) for path in paths if path]
    behind = sum(each > int(number) for each in resnets)
    return slice(behind, behind + resnets.count(int(number)))


def encoder_copy(surgeon: Surgeon, model: Any, widths: tuple[int, ...], channels: int) -> nn.Module:
    """Make a ControlNet with the weights of a UNet."""
    copy: nn.Module = _controlnet(model, widths, channels)
    own, layer_of = dict(model.named_modules()), surgeon.resolver.layer_of
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            path, _, tensor = name.rpartition(".")
            held = layer_of(own[path], tensor).read(own[path], tensor) if path in own else None  # quantized or not
            if held is not None:
                parameter.copy_(held)
    return copy


def borrowed_encoder(
    surgeon: Surgeon, model: Any, lender: Tap, widths: tuple[int, ...], channels: int, rank: int, vectors: bool
) -> nn.Module:
    """Make a ControlNet that reuses the layers of a UNet's encoder and adds low-rank updates to them."""
    with torch.device("meta"):
        network = _controlnet(model, widths, channels)
    borrow(network, model, lender, surgeon.resolver.layer_of, rank, vectors)
    zeros = (network.controlnet_cond_embedding.conv_out, *network.controlnet_down_blocks, network.controlnet_mid_block)
    for layer in zeros:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    made: nn.Module = network
    return made


def _controlnet(model: Any, widths: tuple[int, ...], channels: int) -> Any:
    """Build a ControlNet with the sizes of a UNet, but without its weights."""
    import diffusers

    return diffusers.ControlNetModel.from_unet(
        model,
        conditioning_embedding_out_channels=widths,
        conditioning_channels=channels,
        load_weights_from_unet=False,  # that knows no host with other adapters in it
    )
