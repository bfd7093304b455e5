"""T2I-Adapter beside that of diffusers, with the same numbers in both."""

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


def sketch(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    return {"condition": picture.expand(-1, 3, -1, -1)}


@conformance("t2i_adapter", telling=["unet"], options={"*": {"downscale": 2}}, context=sketch)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def unet(**sizes: Any) -> tuple[Any, dict[str, Tensor]]:
    """The kit's UNet, or one of other sizes."""
    diffusers = pytest.importorskip("diffusers")
    model, inputs = HOSTS["unet"].build()
    if sizes:
        model = diffusers.UNet2DConditionModel.from_config({**model.config, **sizes})
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return model.double().eval().requires_grad_(False), inputs


def adapted(model: Any, **options: Any) -> tuple[Any, peftcore.Injection, list[torch.nn.Parameter]]:
    model = deepcopy(model)
    injection = peftcore.apply(model, "t2i_adapter", dtype="float64", **options)
    return model, injection, list(injection.parameters())


SDXL = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
"""Its first block has no attention and halves the resolution; the last does not."""


@pytest.mark.parametrize("name", ["full_adapter", "full_adapter_xl"])
@against("diffusers 0.42", "t2i_adapter")
def test_outputs_and_gradients_are_those_of_diffusers(name: str) -> None:
    from diffusers import T2IAdapter

    xl = name.endswith("xl")
    base, inputs = unet(**(SDXL if xl else {}))
    model, _, ours = adapted(base, downscale=2, channels=1, scale=0.7, blocks=3)
    reference = T2IAdapter(1, [8, 16, 16, 16] if xl else [8, 16], 3, 4 if xl else 2, name).double()
    theirs = list(reference.parameters())
    if xl:  # without the fourth stage, that of the middle block
        theirs = [p for key, p in reference.named_parameters() if not key.startswith("adapter.body.3")]
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    with torch.no_grad():
        for parameter, other in zip(ours, theirs, strict=True):
            other.copy_(parameter.normal_(0, 0.2))
    image = torch.randn(2, 1, 16, 16).double()
    with peftcore.call(model, condition=image):
        output = model(**inputs).sample
    features = [0.7 * feature for feature in reference(image)][:3]
    expected = base(**inputs, down_intrablock_additional_residuals=features).sample
    assert (output - base(**inputs).sample).abs().max() > 0.01
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    for each in (output, expected):
        (each * direction).sum().backward()
    for parameter, other in zip(ours, theirs, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.any()
        torch.testing.assert_close(parameter.grad, other.grad)


def test_the_network_starts_as_that_of_diffusers() -> None:
    """Both as torch's convolutions do."""
    from diffusers import T2IAdapter

    _, _, ours = adapted(unet()[0])
    theirs = list(T2IAdapter(3, [8, 16], 2, 8).parameters())
    for parameter, other in zip(ours, theirs, strict=True):
        if parameter.numel() > 500:
            assert parameter.detach().std().item() == pytest.approx(other.detach().std().item(), rel=0.15)


def test_the_number_of_parameters_is_the_declared_one() -> None:
    *_, parameters = adapted(unet()[0], channels=1, downscale=4, blocks=2)
    stages = [2 * (10 * c**2 + 2 * c) for c in (8, 16)]
    assert sum(p.numel() for p in parameters) == 9 * 1 * 4**2 * 8 + 8 + sum(stages) + 8 * 16 + 16


def test_several_images_at_once() -> None:
    """Each adapter has a name for its image; their features add up, and a call may say how much each counts."""
    base, inputs = unet()
    model, *_ = adapted(base, downscale=2, name="sketch")
    peftcore.apply(model, "t2i_adapter", name="depth", dtype="float64", downscale=2, input="depth", seed=1)
    images = {"condition": torch.randn(2, 3, 16, 16), "depth": torch.randn(1, 3, 16, 16)}
    peftcore.activate(model, "sketch", "depth")
    with peftcore.call(model, **images):
        both = model(**inputs).sample
        with peftcore.call(model, depth_scale=0.0), peftcore.call(model, condition_scale=0.0):
            torch.testing.assert_close(model(**inputs).sample, base(**inputs).sample)
        with peftcore.call(model, depth_scale=0.0):
            one = model(**inputs).sample
        with peftcore.activate(model, "sketch"):
            torch.testing.assert_close(model(**inputs).sample, one)
    assert (both - one).abs().max() > 1e-3


def test_images_that_do_not_fit_and_hosts_that_are_no_unet_are_refused() -> None:
    base, inputs = unet()
    model, *_ = adapted(base)
    with pytest.raises(MissingContext, match="condition"):
        model(**inputs)
    with peftcore.call(model, condition=torch.randn(1, 3, 32, 64)), pytest.raises(ConfigError, match=r"to \[64, 64\]"):
        model(**inputs)
    with pytest.raises(UnsupportedSite, match="not a block of a UNet"):
        peftcore.plan(base, "t2i_adapter", target="conv_in")
    with pytest.raises(ConfigError, match="no overrides"):
        peftcore.plan(base, "t2i_adapter", overrides={"*": {"scale": 0.5}})
