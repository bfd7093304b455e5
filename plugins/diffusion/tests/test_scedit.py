"""SCEdit beside its authors' code, in a small UNet whose layers both run."""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS

NUMBERS = Path(__file__).parent / "numbers" / "scedit.json"
MADE = SimpleNamespace(**run_path(str(NUMBERS.with_suffix(".py"))))
AUTHORS = {"repository": "modelscope/scepter", "commit": "9f5b439", "script": MADE.SOURCE.script}


@conformance("scedit", telling=["unet"])
def test_conformance(check: Callable[[], None]) -> None:
    check()


def pose(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    return {"condition": picture.expand(-1, 3, -1, -1)}


@conformance("scedit", telling=["unet"], options={"*": {"channels": 3, "widths": [4, 6]}}, context=pose)
def test_conformance_with_an_image(check: Callable[[], None]) -> None:
    check()


def adapted(model: nn.Module, **options: Any) -> tuple[peftcore.Injection, nn.ModuleList]:
    """The method in a host, and its networks: that of the hints, if there is one, and the tuners as they run."""
    injection = peftcore.apply(model, "scedit", dtype="float64", **options)
    shared = [module for path, module in injection.modules() if path.startswith("shared")]
    return injection, nn.ModuleList([*shared, *injection.operators.values()])


@pytest.mark.parametrize("case", MADE.CASES)
@against("authors", "scedit", **AUTHORS)
def test_outputs_and_gradients_are_those_of_the_authors(case: str) -> None:
    made, kernel = MADE, MADE.CASES[case]
    image = {"channels": made.CHANNELS, "widths": made.HINTS, "kernel": kernel} if kernel else {}
    model = made.Host().requires_grad_(False)
    x = made.latents().requires_grad_()
    base = model(x).detach()
    _, networks = adapted(model, scale=made.SCALE, **image)
    made.filled(networks, 13.0)
    with peftcore.call(model, condition=made.image()):
        output = model(x)
    (output * made.wave(*output.shape, phase=2.0)).sum().backward()
    found = [output.detach(), x.grad, *(each.grad for each in networks.parameters())]
    expected = frozen(NUMBERS)[case]
    assert len(found) == len(expected)
    for one, (name, other) in zip(found, expected.items(), strict=True):
        wanted = torch.tensor(other, dtype=torch.float64)
        assert wanted.abs().max() > 1e-6, name
        torch.testing.assert_close(one.flatten(), wanted, rtol=1e-9, atol=1e-11)
    assert (output - base).abs().max() > 1e-3


@against("authors", "scedit", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    made, model, width = MADE, MADE.Host(), MADE.WIDTHS[1]
    image = {"channels": made.CHANNELS, "widths": made.WIDE}
    _, networks = adapted(model, ratio=made.INSIDE / width, target=r"re:up_blocks\.0\.resnets\.0", **image)
    hints, tuner = networks
    layers = {"down": tuner.down, "up": tuner.up, "first": hints.first[-1], "cascade": hints.cascade[-1]}
    for name, told in frozen(NUMBERS, "start").items():
        layer, _, kind = name.partition(".")
        same_start(layers[layer].get_parameter(kind), told)


@pytest.mark.parametrize("case", ["plain", "image"])
@against("authors", "scedit", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train(case: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        in_channels=2,
        out_channels=2,
        block_out_channels=MADE.CHANNELS_OF_UNET,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=MADE.CONTEXT,
        attention_head_dim=2,
    )
    _, networks = adapted(model, **({"channels": 3} if case == "image" else {}))
    assert [each.numel() for each in networks.parameters()] == frozen(NUMBERS, "trains")[case]
    trained = [each for each in model.parameters() if each.requires_grad]
    assert {*map(id, trained)} == {*map(id, networks.parameters())}


@against("authors", "scedit", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(MADE.Host(), "scedit").config, frozen(NUMBERS, "defaults"))


def unet() -> tuple[Any, dict[str, Tensor]]:
    pytest.importorskip("diffusers")
    model, inputs = HOSTS["unet"].build()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return model.double().eval().requires_grad_(False), inputs


def test_skips_of_a_unet_of_diffusers_are_edited() -> None:
    """Where the tuners stand in our host, whose blocks take the skips apart themselves: an edit that is a constant is
    one of what its encoder leaves, the other way round."""
    model, inputs = unet()
    injection, networks = adapted(model)
    assert [operator.number for operator in injection.operators.values()] == [3, 2, 1, 0]
    assert [operator.width for operator in injection.operators.values()] == [16, 8, 8, 8]
    shifts = [torch.randn(operator.width).double() for operator in injection.operators.values()]
    with torch.no_grad():
        for operator, shift in zip(networks, shifts, strict=True):
            operator.up.bias.copy_(shift)
    ours = model(**inputs).sample
    injection.remove()
    shape = [(2, len(shift), side, side) for shift, side in zip(shifts, (4, 4, 8, 8), strict=True)]
    residuals = tuple(s[:, None, None].expand(size) for s, size in zip(shifts, shape, strict=True))[::-1]
    theirs = model(**inputs, down_block_additional_residuals=residuals, mid_block_additional_residual=0).sample
    torch.testing.assert_close(ours, theirs)
    assert (ours - model(**inputs).sample).abs().max() > 1e-2


def test_backward_goes_through_the_decoder_alone() -> None:
    model, inputs = unet()
    states = []
    for path, module in model.named_modules():
        if path in ("conv_in", "down_blocks.1", "mid_block", "up_blocks.0"):
            module.register_forward_hook(lambda *given: states.append(given[2]))
    adapted(model)
    model(**inputs)
    tensors = [state[0] if isinstance(state, tuple) else state for state in states]
    assert [tensor.requires_grad for tensor in tensors] == [False, False, False, True]


def test_the_first_step_with_an_image_moves_tuners_and_biases_of_hints() -> None:
    model, inputs = unet()
    base = model(**inputs).sample
    _, networks = adapted(model, channels=3, widths=[4, 6])
    with peftcore.call(model, condition=torch.randn(1, 3, 16, 16)):
        output = model(**inputs).sample
    assert torch.equal(output, base)
    (output**2).sum().backward()
    moved = {name for name, parameter in networks.named_parameters() if parameter.grad is not None}
    moved = {name for name in moved if networks.get_parameter(name).grad.any()}
    tuners = {f"{number}.up.{tensor}" for number in (1, 2, 3, 4) for tensor in ("weight", "bias")}
    hints = {"0.cascade.0.weight", *(f"0.cascade.{number}.bias" for number in range(4))}
    assert moved == tuners | hints
    with peftcore.call(model, condition=torch.randn(1, 3, 16, 16), condition_scale=0.0):
        networks[1].up.bias.data.add_(1.0)
        assert torch.equal(model(**inputs).sample, base)


def test_what_is_left_out_makes_no_hints_and_sizes_are_options() -> None:
    model, _ = unet()
    options = {"channels": 1, "widths": [4, 6], "kernel": 1, "ratio": 0.5}
    injection, networks = adapted(model, target=r"re:up_blocks\.1\.resnets\.\d", **options)
    assert [tuple(layer.weight.shape) for layer in networks[0].cascade] == [(8, 6, 1, 1), (8, 8, 1, 1)]
    assert [operator.down.out_features for operator in injection.operators.values()] == [4, 4]


def test_what_it_needs() -> None:
    model, inputs = unet()
    for host, target in ((model, "conv_in"), (model, r"re:down_blocks\.0\.resnets\.0")):
        with pytest.raises(UnsupportedSite, match="not a resnet in the decoder"):
            peftcore.plan(host, "scedit", target=target)
    with pytest.raises(ConfigError, match="channels cannot change at single sites"):
        peftcore.plan(model, "scedit", overrides={"*": {"channels": 3}})
    adapted(model, channels=3)
    with pytest.raises(MissingContext, match="condition"):
        model(**inputs)
    with peftcore.call(model, condition=torch.randn(1, 3, 32, 32)), pytest.raises(ConfigError, match="8 times"):
        model(**inputs)


def test_a_decoder_that_reads_other_skips_is_refused() -> None:
    host = MADE.Host()
    host.up_blocks[1].resnets = host.up_blocks[1].resnets[:1]
    with pytest.raises(UnsupportedSite, match="4 skip connections"):
        peftcore.plan(host, "scedit")
