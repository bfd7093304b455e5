"""The network of ControlNet-XS, a thin encoder that runs in parallel with a UNet's encoder, and the operators that run
it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from peftcore.author import Operator, Shared, Site, Surgeon, forward_context
from peftcore.errors import UnsupportedSite
from peftcore_diffusion._told import cast


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A layer of the UNet's encoder, and the paths of the modules that run in parallel with it."""

    at: str
    """The path of the layer in the UNet."""
    layer: str
    """The path of the module that runs in parallel with the layer. This path, `reads` and `adds` are paths in the thin
    encoder's network."""
    reads: str | None
    """The path of the 1x1 convolution from the input of the UNet's layer to `layer`; None if `layer` does not read that
    input."""
    adds: str | None
    """The path of the 1x1 convolution from `layer` to the output of the UNet's layer; None if the attention after
    `layer` has this convolution."""


class Controller(nn.Module):
    """The thin encoder of ControlNet-XS. Its tensors are named as in diffusers' ControlNetXSAdapter, which supports
    only the sizes of Stable Diffusion.

    Args:
        unet: a UNet2DConditionModel.
        ratio: the widths of the thin encoder, as a fraction of the UNet's.
        heads: the number of heads in each attention; None: as many as in the UNet.
        channels: the number of channels of the condition image.
        hints: the widths of the convolutions that read the image.
    """

    def __init__(self, unet: Any, ratio: float, heads: int | None, channels: int, hints: list[int]) -> None:
        super().__init__()
        from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

        widths = [max(1, int(width * ratio)) for width in unet.config.block_out_channels]
        most = unet.config.norm_num_groups or 32
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(widths[0], channels, tuple(hints))
        self.conv_in = nn.Conv2d(unet.conv_in.in_channels, widths[0], 3, padding=1)
        self.control_to_base_for_conv_in = zero_point(widths[0], unet.conv_in.out_channels)
        self.down_blocks, self.up_connections = nn.ModuleList(), nn.ModuleList()
        left = [widths[0]]  # for the decoder
        for block, width in zip(unet.down_blocks, widths, strict=True):
            self.down_blocks.append(_down(block, left, width, heads, most))
        before, width = unet.mid_block.resnets[-1].out_channels, left[-1]
        points = {"base_to_ctrl": zero_point(before, before), "ctrl_to_base": zero_point(width, before)}
        self.mid_block = nn.ModuleDict({**points, "midblock": Middle(unet.mid_block, width, heads)})
        for block in unet.up_blocks:
            adds = nn.ModuleList()
            for resnet in block.resnets:
                adds.append(zero_point(left.pop(), before))
                before = resnet.out_channels
            self.up_connections.append(nn.ModuleDict({"ctrl_to_base": adds}))

    def exchanges(self) -> Iterator[Exchange]:
        """Yields the layers of the encoder, and then the middle block, in the order in which they run."""
        for number, block in enumerate(self.down_blocks):
            parts: Any = block
            here, attends = f"down_blocks.{number}", "attentions" in parts
            for each in range(len(parts["resnets"])):
                layer, reads, adds = (
                    f"{here}.resnets.{each}",
                    f"{here}.base_to_ctrl.{each}",
                    f"{here}.ctrl_to_base.{each}",
                )
                yield Exchange(layer, layer, reads, None if attends else adds)
                if attends:
                    layer = f"{here}.attentions.{each}"
                    yield Exchange(layer, layer, None, adds)
            if "downsamplers" in parts:
                each = len(parts["resnets"])
                layer, reads, adds = (
                    f"{here}.downsamplers",
                    f"{here}.base_to_ctrl.{each}",
                    f"{here}.ctrl_to_base.{each}",
                )
                yield Exchange(f"{layer}.0", layer, reads, adds)
        yield Exchange("mid_block", "mid_block.midblock", "mid_block.base_to_ctrl", "mid_block.ctrl_to_base")


class XSOperator(Operator):
    """Runs parts of the network around a layer of the UNet.

    Args:
        site: the layer.
        network: a `Controller`.
        name: the name under which calls pass the image.
        scale: the factor on the network's outputs, unless a call passes another one.
    """

    def __init__(self, site: Site, network: Shared, name: str, scale: float) -> None:
        super().__init__(site)
        self.network, self.name, self.scale = network, name, scale

    def part(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Return the output of a part of the network, for arguments that are cast to its dtype."""
        like: Tensor = self.network.module.conv_in.weight
        part = self.network.module.get_submodule(path)
        return part(*(cast(each, like) for each in args), **cast(kwargs, like))

    def added(self, path: str, features: Tensor, to: Tensor) -> Tensor:
        """Return the sum of `to` and the scaled output of a convolution of the network."""
        scale = forward_context().context.get(f"{self.name}_scale", self.scale)
        change: Tensor = scale * self.part(path, features)
        return to + change.to(to.dtype)


def controlled(surgeon: Surgeon, middle: Site) -> tuple[str, Any]:
    """Return the path prefix of the UNet that contains a middle block, and the UNet itself.

    Raises:
        UnsupportedSite: the site is not a UNet's middle block, or its layers differ from Stable Diffusion's.
    """
    root, _, name = middle.module_path.rpartition(".")
    unet, diffusers = surgeon.resolver.modules.get(root), sys.modules.get("diffusers")
    if diffusers is None or name != "mid_block" or not isinstance(unet, diffusers.UNet2DConditionModel):
        raise UnsupportedSite(f"{middle.path or 'the host'} is not the middle block of a UNet2DConditionModel")
    from diffusers.models.resnet import Downsample2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    blocks = [*unet.down_blocks, unet.mid_block]
    attentions = [
        each for block in blocks for each in dict(block.named_children()).get("attentions", ()) if each is not None
    ]
    samplers = [each for block in unet.down_blocks for each in block.downsamplers or ()]
    for wanted, layers in ((Transformer2DModel, attentions), (Downsample2D, samplers)):
        if not all(isinstance(each, wanted) for each in layers):
            raise UnsupportedSite(
                f"{middle.path} is in a UNet with other layers than {wanted.__name__} has; use a UNet2DConditionModel "
                "of Stable Diffusion's kind"
            )
    return f"{root}." if root else "", unet


def _down(block: Any, left: list[int], width: int, heads: int | None, most: int) -> nn.ModuleDict:
    """Make the modules that run in parallel with one block of the encoder. `left` lists the widths of the thin
    encoder's skips; those of this block are appended."""
    from diffusers.models.resnet import Downsample2D, ResnetBlock2D

    resnets, reads, adds = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
    parts = nn.ModuleDict({"resnets": resnets, "base_to_ctrl": reads, "ctrl_to_base": adds})
    attentions = block.attentions if "attentions" in dict(block.named_children()) else ()
    for resnet in block.resnets:
        read, base = left[-1] + resnet.in_channels, resnet.out_channels
        sizes = {"in_channels": read, "out_channels": width, "temb_channels": resnet.time_emb_proj.in_features}
        norms = {"groups": _groups(read, most), "groups_out": _groups(width, most), "eps": 1e-5}
        resnets.append(ResnetBlock2D(**sizes, **norms))
        reads.append(zero_point(resnet.in_channels, resnet.in_channels))
        adds.append(zero_point(width, base))
        left.append(width)
    if attentions:
        made = (_attention(each, width, heads, _groups(width, most)) for each in attentions)
        parts["attentions"] = nn.ModuleList(made)
    if block.downsamplers is not None:
        parts["downsamplers"] = Downsample2D(width + base, use_conv=True, out_channels=width, name="op")
        reads.append(zero_point(base, base))
        adds.append(zero_point(width, base))
        left.append(width)
    return parts


class Middle(nn.Module):
    """The module in parallel with the middle block: a resnet, then attentions, each followed by a resnet."""

    def __init__(self, block: Any, width: int, heads: int | None) -> None:
        super().__init__()
        from diffusers.models.resnet import ResnetBlock2D

        base, time = block.resnets[0].in_channels, block.resnets[0].time_emb_proj.in_features
        groups = _groups(math.gcd(width, width + base), 32)
        reads = [width + base, *[width] * (len(block.resnets) - 1)]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels=read, out_channels=width, temb_channels=time, groups=groups) for read in reads
        )
        self.attentions = nn.ModuleList()
        for number, each in enumerate(block.attentions):
            made = None if each is None else _attention(each, width, heads, groups)
            self.attentions.add_module(str(number), made)  # `append` is not annotated for None

    def forward(self, x: Tensor, time: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output for an activation and the embedding of the timestep. Further arguments are passed
        to the attentions."""
        x = self.resnets[0](x, time)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = x if attention is None else attention(x, *args, **kwargs, return_dict=False)[0]
            x = resnet(x, time)
        return x


def _attention(base: Any, width: int, heads: int | None, groups: int) -> nn.Module:
    """Make an attention that runs in parallel with an attention of the UNet."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    cross = base.transformer_blocks[0].attn2
    count = min(heads or cross.heads, width)
    return Transformer2DModel(
        count,
        width // count,
        in_channels=width,
        num_layers=len(base.transformer_blocks),
        cross_attention_dim=cross.cross_attention_dim,
        use_linear_projection=base.use_linear_projection,
        upcast_attention=cross.upcast_attention,
        norm_num_groups=groups,
    )


def _groups(width: int, most: int) -> int:
    """Return the largest divisor of a width that is at most `most`, for use as the number of groups of a norm."""
    return max(number for number in range(1, most + 1) if width % number == 0)


def zero_point(inputs: int, outputs: int) -> nn.Conv2d:
    """Make a 1x1 convolution that starts at zero."""
    layer = nn.Conv2d(inputs, outputs, 1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
