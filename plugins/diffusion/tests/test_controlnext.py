"""ControlNeXt beside its authors' code: the whole UNet of Stable Diffusion 1.5, and that of SDXL, in small."""

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
from peftcore_diffusion.controlnext import ControlFeatures

NUMBERS = Path(__file__).parent / "numbers" / "controlnext.json"
MADE = SimpleNamespace(**run_path(str(NUMBERS.with_suffix(".py"))))
AUTHORS = {
    "repository": "dvlab-research/ControlNeXt",
    "commit": "ab4b3ac",
    "script": "ControlNeXt-SD1.5-Training/models/unet.py",
}
SMALL = {"widths": [8, 8, 16]}


def depth(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    return {"condition": picture.expand(-1, 3, -1, -1)}


@conformance("controlnext", telling=["unet"], options={"*": SMALL}, context=depth)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def in_their_order(features: Any) -> list[nn.Parameter]:
    """The parameters of the network: in theirs the convolutions that halve stand behind all residual blocks."""
    halving = [stage.halve for stage in features.stages]
    last = {id(each) for convolution in halving for each in convolution.parameters()}
    parts = [features.time, features.stem, features.stages, *halving, features.mix, features.out]
    named = [(part is features.stages, each) for part in parts for each in part.parameters()]
    return [each for staged, each in named if not (staged and id(each) in last)]


@pytest.mark.parametrize("case", ["sd15", "sdxl"])
@against("authors", "controlnext", **AUTHORS)
def test_outputs_and_gradients_are_those_of_the_authors(case: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = frozen(NUMBERS)[case]
    model = diffusers.UNet2DConditionModel(**MADE.UNET).double().train().requires_grad_(False)
    MADE.filled(list(model.parameters()), 0.0, MADE.DEVIATION)
    injection = peftcore.apply(model, "controlnext", scale=MADE.SCALE, before=case == "sdxl", dtype="float64")
    operators = dict(injection.operators)
    network = in_their_order(operators.pop("down_blocks.0").features)
    MADE.filled(network, 1000.0)
    inputs, image = MADE.given(), MADE.image().requires_grad_()
    inputs["sample"].requires_grad_()
    with peftcore.call(model, condition=image):
        output = model(**inputs).sample
    (output * MADE.wave(*output.shape, phase=6.0)).sum().backward()
    trained = [operators[name.removesuffix(".weight")] for name in theirs["trained"]]
    assert len(trained) == len(operators)
    traces = MADE.traces([image.grad, *(each.grad for each in [*network, *(one.value for one in trained)])])
    assert MADE.near(output.detach(), theirs["output"])
    assert MADE.near(inputs["sample"].grad, theirs["sample"])
    assert MADE.near(torch.tensor(traces, dtype=torch.float64), theirs["traces"])
    with peftcore.call(model, condition=image, condition_scale=0.0), torch.no_grad():
        assert (output - model(**inputs).sample).abs().max() > 1e-2


def wide() -> Any:
    """A UNet of which the first block is as wide as that of Stable Diffusion."""
    return pytest.importorskip("diffusers").UNet2DConditionModel(**MADE.WIDE)


@against("authors", "controlnext", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    """The network of an injection; tensors of few numbers together with those of more such networks."""
    widths = [64, 128, MADE.STARTS["last"]]
    operators: Any = peftcore.apply(wide(), "controlnext", widths=widths).operators
    first = operators["down_blocks.0"].features
    networks = [first, *(ControlFeatures(3, widths, 320) for _ in range(1, MADE.STARTS["networks"]))]
    ours, told = MADE.pooled([*in_their_order(each)] for each in networks), frozen(NUMBERS, "start")
    for value, start in zip(ours, told.values(), strict=True):
        same_start(value, start)


@against("authors", "controlnext", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    told, operators = frozen(NUMBERS, "trains"), dict(peftcore.apply(wide(), "controlnext").operators)
    network = in_their_order(operators.pop("down_blocks.0").features)
    assert [each.numel() for each in network if each.requires_grad] == told["network"]
    base = {name.removesuffix(".weight"): size for name, size in told["base"].items()}
    assert {path: each.value.numel() for path, each in operators.items()} == base


@against("authors", "controlnext", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(wide(), "controlnext").config, frozen(NUMBERS, "defaults"))


def unet() -> tuple[Any, dict[str, Tensor]]:
    pytest.importorskip("diffusers")
    model, inputs = HOSTS["unet"].build()
    return model.eval().requires_grad_(False), inputs


@pytest.mark.parametrize("case", ["sd15", "sdxl"])
def test_the_network_is_as_large_as_that_of_the_authors(case: str) -> None:
    network = ControlFeatures(3, [64, 128, 256], 320)
    assert sum(each.numel() for each in network.parameters()) == frozen(NUMBERS)[case]["count"]


def test_rates_of_the_network_and_of_the_base() -> None:
    model, _ = unet()
    injection = peftcore.apply(model, "controlnext", control_rate=4.0, **SMALL)
    control, base = injection.optimizer(torch.optim.SGD, lr=0.5).param_groups
    features = injection.operators["down_blocks.0"].parameters()
    assert (control["lr"], base["lr"]) == (2.0, 0.5)
    assert {id(each) for each in control["params"]} == {id(each) for each in features}
    assert len(control["params"]) + len(base["params"]) == len(list(injection.parameters()))


def test_which_matrices_of_the_base_train_along() -> None:
    """Theirs for SDXL are `.*attn2.*to_out.*`."""
    model, _ = unet()
    injection = peftcore.apply(model, "controlnext", base="cross", **SMALL)
    wanted = {name.removesuffix(".weight") for name, _ in model.named_parameters() if "attn2.to_out.0." in name}
    assert injection.operators.keys() == {"down_blocks.0", *(each for each in wanted if ".peft." not in each)}


def test_a_block_alone_leaves_the_base_as_it_is() -> None:
    model, inputs = unet()
    base = model(**inputs).sample
    injection = peftcore.apply(model, "controlnext", target="down_blocks.1", base="none", **SMALL)
    assert list(injection.operators) == ["down_blocks.1"]
    for size in (64, 40):  # of any size: the feature is brought to that of the stream
        with peftcore.call(model, condition=torch.randn(1, 3, size, size)):
            assert (model(**inputs).sample - base).abs().max() > 1e-3
            with peftcore.call(model, condition_scale=0.0):
                assert torch.equal(model(**inputs).sample, base)


def test_what_it_needs() -> None:
    model, inputs = unet()
    for target in ("cross.out", "down_blocks.0.resnets.0"):
        with pytest.raises(UnsupportedSite, match="is not a block of a UNet"):
            peftcore.plan(model, "controlnext", target=target)
    with pytest.raises(ConfigError, match="multiple of 8"):
        peftcore.plan(model, "controlnext", widths=[8, 8, 12])
    peftcore.apply(model, "controlnext", **SMALL)
    with pytest.raises(MissingContext, match="condition"):
        model(**inputs)
