"""Pictures of several prompts in pipelines with classifier-free guidance, beside the pipelines of diffusers that have
the same network, and beside each prompt by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import painters
import pytest
import torch
from torch import Tensor

import peftcore
from peftcore.errors import RouteError
from peftcore.testing.kit import fill

PICTURES = {
    "controlnet": {},
    "controlnet_lora": {},
    "controlnet_xs": {},
    "controlnext": {},
    "controlnet_lllite": {},
    "t2i_adapter": {"downscale": 8},
    "scedit": {"channels": 3},
    "ip_adapter": {"embed_dim": 12},
}
PROMPTS = ["zero", "one"]


def pipeline(method: str) -> Any:
    """One whose images are latents, with a filled adapter."""
    torch.manual_seed(0)
    made = painters.stable_diffusion()
    made.set_progress_bar_config(disable=True)
    for part in (made.unet, made.text_encoder, made.vae):
        part.eval().requires_grad_(False)
    fill(peftcore.apply(made.unet, method, **PICTURES[method]), 1)
    return made


def pictures(method: str) -> tuple[str, Tensor]:
    name, shape = ("image_embeds", (2, 12)) if method == "ip_adapter" else ("condition", (2, 3, 64, 64))
    return name, torch.rand(shape, generator=torch.Generator().manual_seed(5))


def paint(made: Any, prompts: list[str], noise: Tensor, guidance: float = 4.0, **options: Any) -> Tensor:
    found: Tensor = made(
        prompts, latents=noise, num_inference_steps=2, guidance_scale=guidance, output_type="latent", **options
    ).images
    return found


@torch.no_grad()
@pytest.mark.parametrize("method", PICTURES)
def test_each_prompt_has_its_own_picture(method: str) -> None:
    made, (name, given) = pipeline(method), pictures(method)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    alone = []
    for row in range(4):  # two images of each prompt
        with peftcore.call(made.unet, **{name: given[row // 2 : row // 2 + 1]}):
            alone.append(paint(made, PROMPTS[row // 2 : row // 2 + 1], noise[row : row + 1]))
    expected = torch.cat(alone)
    with peftcore.call(made.unet, **{name: given}):
        with pytest.raises(RouteError, match=f"{name} has 2 entries, but the batch has 4 rows.*guidance=True"):
            paint(made, PROMPTS, noise[::2])
        with peftcore.call(made.unet, guidance=True):
            torch.testing.assert_close(paint(made, PROMPTS, noise[::2]), expected[::2], atol=1e-4, rtol=1e-4)
            with peftcore.call(made.unet, copies=2):
                found = paint(made, PROMPTS, noise, num_images_per_prompt=2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    others = peftcore.call(made.unet, **{name: given.flip(0)}, guidance=True)
    with others:
        assert (paint(made, PROMPTS, noise[::2]) - expected[::2]).abs().max() > 1e-3, "the picture counts"


def with_controlnet(made: Any, picture: Tensor, prompts: list[str], noise: Tensor) -> Tensor:
    network = diffusers.ControlNetModel.from_unet(made.unet, load_weights_from_unet=False)
    own = peftcore.injections(made.unet)["controlnet"].state_dict()
    names = {key.split("control_.", 1)[-1]: value for key, value in own.items()}
    network.load_state_dict(names)
    theirs: Any = diffusers.StableDiffusionControlNetPipeline(**made.components, controlnet=network.eval())
    theirs.set_progress_bar_config(disable=True)
    return paint(theirs, prompts, noise, image=picture)


def with_t2i_adapter(made: Any, picture: Tensor, prompts: list[str], noise: Tensor) -> Tensor:
    network = diffusers.T2IAdapter(3, [8, 16], 2, 8, "full_adapter")
    own = [*peftcore.injections(made.unet)["t2i_adapter"].parameters()]
    for parameter, value in zip(network.parameters(), own, strict=True):
        parameter.data.copy_(value)
    parts = {name: part for name, part in made.components.items() if name != "image_encoder"}
    theirs: Any = diffusers.StableDiffusionAdapterPipeline(**parts, adapter=network, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    return paint(theirs, prompts, noise, image=picture)


@torch.no_grad()
@pytest.mark.parametrize(("method", "theirs"), [("controlnet", with_controlnet), ("t2i_adapter", with_t2i_adapter)])
def test_pictures_are_those_of_the_pipeline_of_diffusers(method: str, theirs: Callable[..., Tensor]) -> None:
    made, (name, given) = pipeline(method), pictures(method)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    with peftcore.call(made.unet, **{name: given}, guidance=True):
        found = paint(made, PROMPTS, noise)
    with peftcore.activate(made.unet):
        expected = theirs(made, given, PROMPTS, noise)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
