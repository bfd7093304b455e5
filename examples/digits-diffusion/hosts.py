"""Digits in two styles, two denoisers of diffusers that draw the first style, and how they are trained and sampled.

An image has 16 x 16 pixels. As in Stable Diffusion the denoisers work on latents of half its size with four channels; a
rearrangement of the pixels takes the place of the autoencoder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0
BATCH_SIZE = 32
HELD_OUT = 200
WIDTH = 16
"""Width of the vectors that tell the UNet which digit to draw, in the place of a text encoder's."""


def digits() -> tuple[Tensor, Tensor]:
    """White on black, [1797, 1, 16, 16] in -1 .. 1, and their labels; the first 200 are held out."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(SEED))
    small = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1
    large = F.interpolate(small, size=12, mode="bicubic", align_corners=False)
    sharp = (2.5 * large).tanh()  # the blur of the enlargement becomes an edge
    return F.pad(sharp, (2, 2, 2, 2), value=-1.0), torch.tensor(found.target)[order]


def faded_italics(images: Tensor) -> Tensor:
    """The new style: white on grey, and slanted."""
    slant = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(slant, list(images.shape), align_corners=False)
    return 0.5 + 0.5 * F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def edges(images: Tensor) -> Tensor:
    """The pixels around the ink, [n, 1, 16, 16], 0 or 1."""
    ink = (images > 0).float()
    return F.max_pool2d(ink, 3, stride=1, padding=1) - ink


def encode(images: Tensor) -> Tensor:
    return F.pixel_unshuffle(images, 2)  # [n, 4, 8, 8]


def decode(latents: Tensor) -> Tensor:
    return F.pixel_shuffle(latents, 2).clamp(-1, 1)


def unet() -> nn.Module:
    """Convolutions, and attention to the words on the lower level."""
    model: nn.Module = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return model


def dit() -> nn.Module:
    """A diffusion transformer on 16 patches."""
    model: nn.Module = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return model


@dataclass(frozen=True)
class Denoiser:
    """A host, and how it is told which digit to draw.

    Attributes:
        lr: its learning rate in pretraining.
        pretraining: how many steps that takes.
        adaptation: how many a method gets to learn the style.
        told: the arguments of forward that say so.
    """

    build: Callable[[], nn.Module]
    lr: float
    pretraining: int
    adaptation: int
    told: Callable[[Tensor], dict[str, Tensor]]


WORDS = torch.randn(10, 4, WIDTH, generator=torch.Generator().manual_seed(SEED))
HOSTS: dict[str, Denoiser] = {
    "UNet": Denoiser(unet, 3e-3, 450, 120, lambda labels: {"encoder_hidden_states": WORDS[labels]}),
    "DiT": Denoiser(dit, 4e-3, 1200, 400, lambda labels: {"class_labels": labels}),
}


@functools.cache
def scheduler() -> Any:
    """The noise of "iDDPM", down to nothing but noise, so that also the brightness of the paper is drawn."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def loss(model: nn.Module, host: Denoiser, images: Tensor, labels: Tensor, drawn: torch.Generator) -> Tensor:
    """How far the velocity that the model sees in noisy images is from the true one."""
    schedule, latents = scheduler(), encode(images)
    noise = torch.randn(latents.shape, generator=drawn)
    times = torch.randint(1000, (len(latents),), generator=drawn)
    seen: Tensor = model(schedule.add_noise(latents, noise, times), timestep=times, **host.told(labels)).sample
    return F.mse_loss(seen, schedule.get_velocity(latents, noise, times))


@torch.no_grad()
def draw(model: nn.Module, host: Denoiser, labels: Tensor, steps: int = 20) -> Tensor:
    """One image for each label, by DDIM, always from the same noise."""
    schedule = scheduler()
    schedule.set_timesteps(steps)
    latents = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(SEED))
    for time in schedule.timesteps:
        seen = model(latents, timestep=time.expand(len(labels)), **host.told(labels)).sample
        latents = schedule.step(seen, time, latents).prev_sample
    return decode(latents)


class Reader(nn.Module):
    """A small classifier that scores what was drawn."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(32 * 16, classes)

    def forward(self, images: Tensor) -> Tensor:  # [batch, 1, 16, 16]
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits
