"""ControlNet-XS beside that of diffusers, whose model is UNet and controls in one."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS


def pose(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    return {"condition": picture.expand(-1, 3, -1, -1)}


@conformance("controlnet_xs", telling=["unet"], options={"*": {"ratio": 1.5, "widths": [4, 6]}}, context=pose)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def unet(**sizes: Any) -> tuple[Any, dict[str, Tensor]]:
    """A UNet as diffusers' ControlNet-XS wants it: two resnets in a block, four channels, and its epsilons."""
    diffusers = pytest.importorskip("diffusers")
    kit, _ = HOSTS["unet"].build()
    own = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_eps": 1e-6, "cross_attention_dim": 14}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")}
    kinds["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    torch.manual_seed(0)
    made = {**kit.config, **own, **kinds, "block_out_channels": (8, 16, 24), **sizes}
    model = diffusers.UNet2DConditionModel(**{name: size for name, size in made.items() if name[0] != "_"})
    model.conv_norm_out.eps = 1e-5
    inputs: dict[str, Any] = {"sample": torch.randn(2, 4, 8, 8).double(), "timestep": torch.tensor([3, 5])}
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 14).double()
    return model.double().eval().requires_grad_(False), inputs


def adapted(model: Any, **options: Any) -> tuple[Any, peftcore.Injection, Any]:
    """A copy of a host with the method in it, and the network."""
    model = deepcopy(model)
    given = {"ratio": 0.5, "widths": [4, 6], "channels": 1, **options}
    injection = peftcore.apply(model, "controlnet_xs", dtype="float64", **given)
    (network,) = (module for path, module in injection.modules() if path.startswith("shared"))
    return model, injection, network


@torch.no_grad()
def stir(network: nn.Module) -> None:
    """Move all tensors by N(0, 0.1), to numbers of float32: theirs go through it."""
    for parameter in network.parameters():
        parameter.copy_(parameter.add(torch.randn_like(parameter) * 0.1).float())


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 30,
    "transformer_layers_per_block": (1, 2, 1),
    "use_linear_projection": True,
}


@pytest.mark.parametrize("sizes", [{}, XL], ids=["sd", "sdxl"])
@against("diffusers 0.42", "controlnet_xs")
def test_outputs_and_gradients_are_those_of_diffusers(sizes: dict[str, Any]) -> None:
    from diffusers import ControlNetXSAdapter, UNetControlNetXSModel

    base, inputs = unet(**sizes)
    if sizes:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 6).double(), "time_ids": torch.randn(2, 3)}
    model, _, network = adapted(base, scale=0.7)
    stir(network)
    options = {"conditioning_channels": 1, "conditioning_embedding_out_channels": (4, 6)}
    adapter = ControlNetXSAdapter.from_unet(base, size_ratio=0.5, **options)
    adapter.load_state_dict(network.state_dict())  # names and shapes are theirs
    theirs = UNetControlNetXSModel.from_unet(base, adapter).double()
    theirs.freeze_unet_params()
    image = torch.randn(2, 1, 16, 16).double()
    given = inputs["sample"].requires_grad_(), inputs["encoder_hidden_states"].requires_grad_()
    for mode in (False, True):
        model.train(mode)
        theirs.train(mode)
        with peftcore.call(model, condition=image):
            ours = model(**inputs).sample
        expected = theirs(**inputs, controlnet_cond=image, conditioning_scale=0.7).sample
        assert (ours - base(**inputs).sample).abs().max() > 0.01
        torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(ours)
    mine = [*network.parameters(), *given]
    found = torch.autograd.grad((ours * direction).sum(), mine)
    moving = named_as_ours(theirs, network)
    wanted = torch.autograd.grad((expected * direction).sum(), [*moving, *given])
    assert len(moving) == sum(parameter.requires_grad for parameter in theirs.parameters())
    for one, other in zip(found, wanted, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


def named_as_ours(theirs: nn.Module, network: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of their model, which calls them otherwise, in the order of ours."""
    parameters = dict(theirs.named_parameters())
    found = []
    for name in dict(network.named_parameters()):
        name = name.replace("up_connections", "up_blocks").replace("mid_block.midblock", "mid_block.ctrl_midblock")
        if not name.startswith(("control", "mid")):
            name = name.replace("conv_in", "ctrl_conv_in")
        for part in ("resnets", "attentions", "downsamplers"):
            name = name.replace(f".{part}.", f".ctrl_{part}.", 1) if name.startswith("down") else name
        found.append(parameters[name])
    return found


def test_the_kits_unet_by_hand() -> None:
    """What no UNet of theirs has: blocks of one resnet; the equation once more, over the UNet's own layers."""
    base, inputs = HOSTS["unet"].build()
    base = base.double().eval().requires_grad_(False)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    model, _, network = adapted(base, scale=0.7)
    stir(network)
    image = torch.randn(2, 1, 16, 16).double()
    with peftcore.call(model, condition=image):
        ours = model(**inputs).sample
    torch.testing.assert_close(ours, by_hand(base, network, inputs, image, 0.7))
    assert (ours - base(**inputs).sample).abs().max() > 0.01


def by_hand(base: Any, network: Any, inputs: dict[str, Tensor], image: Tensor, scale: float) -> Tensor:
    text = {"encoder_hidden_states": inputs["encoder_hidden_states"], "return_dict": False}
    time = base.time_embedding(base.time_proj(inputs["timestep"]).double())
    h, g = base.conv_in(inputs["sample"]), network.conv_in(inputs["sample"])
    g = g + network.controlnet_cond_embedding(image)
    h = h + scale * network.control_to_base_for_conv_in(g)
    skips = [(h, g)]
    one, two = base.down_blocks[0], network.down_blocks[0]
    g = two["resnets"][0](torch.cat([g, two["base_to_ctrl"][0](h)], 1), time)
    h, g = one.attentions[0](one.resnets[0](h, time), **text)[0], two["attentions"][0](g, **text)[0]
    h = h + scale * two["ctrl_to_base"][0](g)
    skips.append((h, g))
    g = two["downsamplers"](torch.cat([g, two["base_to_ctrl"][1](h)], 1))
    h = one.downsamplers[0](h) + scale * two["ctrl_to_base"][1](g)
    skips.append((h, g))
    one, two = base.down_blocks[1], network.down_blocks[1]
    g = two["resnets"][0](torch.cat([g, two["base_to_ctrl"][0](h)], 1), time)
    h = one.resnets[0](h, time) + scale * two["ctrl_to_base"][0](g)
    skips.append((h, g))
    g = torch.cat([g, network.mid_block["base_to_ctrl"](h)], 1)
    g = network.mid_block["midblock"](g, time, inputs["encoder_hidden_states"])
    h = base.mid_block(h, time, inputs["encoder_hidden_states"]) + scale * network.mid_block["ctrl_to_base"](g)
    for one, two in zip(base.up_blocks, network.up_connections, strict=True):
        for number, resnet in enumerate(one.resnets):
            skip, control = skips.pop()
            h = h + scale * two["ctrl_to_base"][number](control)
            h = resnet(torch.cat([h, skip], 1), time)
            h = h if one is base.up_blocks[0] else one.attentions[number](h, **text)[0]
        h = one.upsamplers[0](h) if one is base.up_blocks[0] else h
    output: Tensor = base.conv_out(base.conv_act(base.conv_norm_out(h)))
    return output


def test_the_first_step_moves_what_adds_alone() -> None:
    base, inputs = unet()
    model, injection, network = adapted(base)
    with peftcore.call(model, condition=torch.randn(1, 1, 16, 16)):
        output = model(**inputs).sample
    assert torch.equal(output, base(**inputs).sample)
    output.square().sum().backward()
    moved = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in network.named_parameters() if "ctrl_to_base" in name or "to_base_for" in name}
    assert sum(p.numel() for p in injection.parameters()) == sum(p.numel() for p in network.parameters())


class Pipeline(nn.Module):
    """A UNet inside a host that has inputs of its own."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        sample: Tensor = self.unet(2 * latents, step, encoder_hidden_states=text).sample
        return sample


def test_a_unet_inside_a_host_is_controlled_too() -> None:
    base, inputs = unet()
    model, _, network = adapted(Pipeline(base))
    stir(network)
    alone, _, twin = adapted(base)
    twin.load_state_dict(network.state_dict())
    image, args = torch.randn(2, 1, 16, 16), list(inputs.values())
    with peftcore.call(model, condition=image), peftcore.call(alone, condition=image):
        inner = model(*args)
        torch.testing.assert_close(inner, alone(**{**inputs, "sample": 2 * inputs["sample"]}).sample)
        with peftcore.call(model, condition_scale=0.0):
            assert (model(*args) - inner).abs().max() > 0.01
            assert torch.equal(model(*args), Pipeline(base)(*args))


def test_what_it_needs() -> None:
    base, inputs = unet()
    model, *_ = adapted(base)
    with pytest.raises(MissingContext, match="condition"):
        model(**inputs)
    with peftcore.call(model, condition=torch.randn(1, 1, 32, 32)), pytest.raises(ConfigError, match="resize"):
        model(**inputs)
    for host, target in ((base, "conv_in"), (HOSTS["mlp"].build()[0], "first")):
        with pytest.raises(UnsupportedSite, match="UNet2DConditionModel"):
            peftcore.plan(host, "controlnet_xs", target=target)
    with pytest.raises(ConfigError, match="no overrides"):
        peftcore.plan(base, "controlnet_xs", overrides={"*": {"scale": 0.5}})
    other, _ = unet(down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D"))
    with pytest.raises(UnsupportedSite, match="Transformer2DModel"):
        peftcore.plan(other, "controlnet_xs")
