"""ControlNet beside that of diffusers, which hands its features to the UNet as arguments."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, RouteError, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS


def pose(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    return {"condition": picture.expand(-1, 3, -1, -1)}


FAILURES = {
    "modules_named_like_the_method_are_ordinary-unet": "what reads the inputs of a UNet inside a host is at the UNet: "
    "its path is the very name without which the check compares"
}


@conformance(
    "controlnet", telling=["unet"], options={"*": {"widths": [4, 6]}}, context=pose, expected_failures=FAILURES
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def unet() -> tuple[Any, dict[str, Tensor]]:
    pytest.importorskip("diffusers")
    model, inputs = HOSTS["unet"].build()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return model.double().eval().requires_grad_(False), inputs


def adapted(model: Any, **options: Any) -> tuple[Any, peftcore.Injection, Any]:
    """A copy of a host with the method in it, and the network."""
    model = deepcopy(model)
    injection = peftcore.apply(model, "controlnet", dtype="float64", widths=[4, 6], channels=1, **options)
    (network,) = (module for path, module in injection.modules() if path.startswith("shared"))
    return model, injection, network


@torch.no_grad()
def stir(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("guess_mode", [False, True])
@against("diffusers 0.42", "controlnet")
def test_outputs_and_gradients_are_those_of_diffusers(guess_mode: bool) -> None:
    base, inputs = unet()
    model, _, network = adapted(base, scale=0.7, guess_mode=guess_mode)
    stir(network)
    reference, image = deepcopy(network), torch.randn(2, 1, 16, 16).double()
    with peftcore.call(model, condition=image):
        ours = model(**inputs).sample
    down, mid = reference(
        **inputs, controlnet_cond=image, conditioning_scale=0.7, guess_mode=guess_mode, return_dict=False
    )
    controls = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    expected = base(**inputs, **controls).sample
    assert (ours - base(**inputs).sample).abs().max() > 0.01
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for (name, parameter), other in zip(network.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, other.grad)


def test_the_copy_starts_as_the_base_and_its_first_step_moves_the_zero_convolutions_alone() -> None:
    base, inputs = unet()
    model, injection, network = adapted(base)
    held = dict(base.named_parameters())
    copied = {name: parameter for name, parameter in network.named_parameters() if name in held}
    encoder = ("conv_in", "time_embedding", "down_blocks", "mid_block")
    assert copied.keys() == {name for name in held if name.startswith(encoder)}
    assert all(torch.equal(parameter, held[name]) for name, parameter in copied.items())
    with peftcore.call(model, condition=torch.randn(1, 1, 16, 16)):
        output = model(**inputs).sample
    assert torch.equal(output, base(**inputs).sample)
    output.square().sum().backward()
    zeros = ("controlnet_down_blocks", "controlnet_mid_block")
    moved = {
        name for name, parameter in network.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {name for name, _ in network.named_parameters() if name.startswith(zeros)}
    assert sum(p.numel() for p in injection.parameters()) == sum(p.numel() for p in network.parameters())


def test_other_adapters_of_the_host_are_not_copied() -> None:
    base, inputs = unet()
    peftcore.apply(base, "lora", target="all-linear", dtype="float64")
    model, _, network = adapted(base)
    assert not [name for name, _ in network.named_parameters() if "lora" in name or "peft" in name]
    peftcore.activate(model, "controlnet")
    stir(network)
    with peftcore.call(model, condition=torch.randn(1, 1, 16, 16)):
        assert torch.isfinite(model(**inputs).sample).all()


class Pipeline(nn.Module):
    """A UNet inside a host that has inputs of its own."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        sample: Tensor = self.unet(2 * latents, step, encoder_hidden_states=text).sample
        return sample


def test_a_unet_inside_a_host_gets_its_own_inputs() -> None:
    base, inputs = unet()
    model, injection, network = adapted(Pipeline(base))
    stir(network)
    alone, _, twin = adapted(base)
    twin.load_state_dict(network.state_dict())
    image = torch.randn(2, 1, 16, 16)
    with peftcore.call(model, condition=image), peftcore.call(alone, condition=image):
        inner = model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
        expected = alone(**{**inputs, "sample": 2 * inputs["sample"]}).sample
        with peftcore.call(model, condition_scale=0.0):
            plain = model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
    torch.testing.assert_close(inner, expected)
    assert (plain - inner).abs().max() > 0.01
    assert "unet" in injection.operators


def test_what_it_needs() -> None:
    base, inputs = unet()
    model, *_ = adapted(base)
    with pytest.raises(MissingContext, match="condition"):
        model(**inputs)
    with pytest.raises(RouteError, match="controlnet"):
        peftcore.route(model, ["controlnet", None])
    for host, target in ((base, "conv_in"), (HOSTS["mlp"].build()[0], "first")):
        with pytest.raises(UnsupportedSite, match="UNet2DConditionModel"):
            peftcore.plan(host, "controlnet", target=target)
    with pytest.raises(ConfigError, match="no overrides"):
        peftcore.plan(base, "controlnet", overrides={"*": {"scale": 0.5}})
