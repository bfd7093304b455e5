"""Pipelines of diffusers for training: the denoiser, the encoding of text, and the shape of latents."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from peftcore_lab.tasks._noising import Diffusion, Flow, Noising

Words = dict[str, Any]
"""Arguments of a denoiser's forward that contain the encoded texts of some rows."""


class TextEncoder(NamedTuple):
    """One text encoder of a pipeline, with its tokenizer."""

    encoder: Any
    tokenizer: Any
    file: str
    """The encoder's name in files of embeddings: ``clip_l``, ``clip_g`` or ``t5``."""


class Painter(ABC):
    """Wraps one kind of diffusers pipeline for training.

    Attributes:
        denoiser: the part that predicts the noise.
        readers: the text encoders, by the suffix of their names in the pipeline: ``""``, ``_2``, ``_3``.
    """

    noising: ClassVar[type[Diffusion] | type[Flow]]
    part: ClassVar[str]
    """The denoiser's name among the components of the pipeline: ``unet`` or ``transformer``."""
    files: ClassVar[tuple[str, ...]]
    """Names of the text encoders in files of embeddings, in the order of the pipeline."""

    def __init__(self, pipeline: Any, guidance: float) -> None:
        self.pipeline, self.guidance = pipeline, guidance
        self.denoiser: Any = pipeline.components[self.part]
        self.readers: dict[str, TextEncoder] = {}
        for number, file in zip(("", "_2", "_3"), self.files, strict=False):
            encoder = pipeline.components.get(f"text_encoder{number}")
            if encoder is not None:
                # Some tokenizers do not know how long a text may be.
                longest = encoder.config.to_dict().get("max_position_embeddings", math.inf)
                tokenizer = pipeline.components[f"tokenizer{number}"]
                tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
                self.readers[number] = TextEncoder(encoder, tokenizer, file)

    @property
    def encoders(self) -> list[Any]:
        """Return the text encoders."""
        return [each.encoder for each in self.readers.values()]

    @property
    def side(self) -> int:
        """Return the height and width, in pixels, of the square pictures that the pipeline generates."""
        return int(self.denoiser.config.sample_size * self.pipeline.vae_scale_factor)

    def noise(self, min_snr: float | None) -> Noising:
        """Return the object that adds noise to latents in the pipeline's training.

        Raises:
            BadInput: `min_snr` is set, but the pipeline is a flow model.
        """
        return self.noising(self.pipeline.scheduler, min_snr)

    def latents(self, pictures: Tensor, drawn: torch.Generator | None) -> Tensor:
        """Return pictures [rows, 3, height, width] in -1 .. 1 as latents [rows, channels, ...]."""
        vae = self.pipeline.vae
        found = vae.encode(pictures.to(vae.dtype)).latent_dist.sample(drawn)
        latents: Tensor = (found - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
        return latents

    @abstractmethod
    def words(self, texts: Sequence[str], sizes: Tensor) -> Words:
        """Return the encoded captions of pictures as arguments of the denoiser. `sizes` are [rows, 6]: height and width
        of the picture, top and left of the crop, height and width of the crop."""

    def denoise(self, noisy: Tensor, times: Tensor, words: Words) -> Tensor:
        """Return the denoiser's output for noisy latents."""
        said: Tensor = self.denoiser(noisy, timestep=times, **words, return_dict=False)[0]
        return said


class StableDiffusion(Painter):
    """Stable Diffusion 1 and 2: a UNet and one text encoder."""

    noising = Diffusion
    part = "unet"
    files: ClassVar[tuple[str, ...]] = ("clip_l",)

    def words(self, texts: Sequence[str], sizes: Tensor) -> Words:
        return {"encoder_hidden_states": self.pipeline.encode_prompt(list(texts), sizes.device, 1, False)[0]}


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, and a UNet that gets a picture's size and its crop as inputs."""

    files = ("clip_l", "clip_g")

    def words(self, texts: Sequence[str], sizes: Tensor) -> Words:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), device=sizes.device, do_classifier_free_guidance=False
        )
        added = {"text_embeds": pooled, "time_ids": sizes.to(pooled.dtype)}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}


class StableDiffusion3(Painter):
    """Stable Diffusion 3: three text encoders, and a transformer that predicts the flow of the latents."""

    noising = Flow
    part = "transformer"
    files: ClassVar[tuple[str, ...]] = ("clip_l", "clip_g", "t5")

    def words(self, texts: Sequence[str], sizes: Tensor) -> Words:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), None, None, device=sizes.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


class Flux(StableDiffusion3):
    """Flux: two text encoders, and a transformer over patches of 2 x 2 latents with their positions."""

    files = ("clip_l", "t5")

    @property
    def side(self) -> int:
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    def words(self, texts: Sequence[str], sizes: Tensor) -> Words:
        hidden, pooled, places = self.pipeline.encode_prompt(list(texts), device=sizes.device)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled, "txt_ids": places}

    def denoise(self, noisy: Tensor, times: Tensor, words: Words) -> Tensor:
        squares = functional.pixel_unshuffle(noisy, 2)  # [rows, 4 * channels, height / 2, width / 2]
        rows, _, height, width = squares.shape
        at = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).to(noisy)
        told = {**words, "img_ids": at}
        if self.denoiser.config.guidance_embeds:
            told["guidance"] = torch.full((rows,), self.guidance, device=noisy.device)
        said = super().denoise(squares.flatten(2).mT, times / 1000, told)
        return functional.pixel_shuffle(said.mT.reshape(rows, -1, height, width), 2)


def kinds() -> dict[type, type[Painter]]:
    """Return the pipelines that can be trained, as a mapping from their classes in diffusers to subclasses of
    `Painter`."""
    import diffusers

    library: Any = diffusers
    return {
        library.StableDiffusionPipeline: StableDiffusion,
        library.StableDiffusionXLPipeline: StableDiffusionXL,
        library.StableDiffusion3Pipeline: StableDiffusion3,
        library.FluxPipeline: Flux,
    }
