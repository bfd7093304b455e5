"""The task of pictures and what they are called, for pipelines of the kind of Stable Diffusion: the denoiser is
adapted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.comparing.data.columns import TEXT_NAMES, choose_column
from peftcore.comparing.data.sources import splits
from peftcore.comparing.errors import BadInput
from peftcore.comparing.models.files import PIPELINE
from peftcore.comparing.models.loading import UNREADABLE, unreadable
from peftcore.comparing.models.naming import Use, find
from peftcore.comparing.runs.folder import first_process
from peftcore.comparing.runs.run import Run
from peftcore.comparing.tasks.image_classification import IMAGES
from peftcore.comparing.tasks.task import Data, Prepared, Task


class CaptionedData(Data):
    """Options of the data: a column of pictures, and one of what they are called."""

    image: str | None = None
    """Column of the pictures; guessed when left out."""
    text: str | None = None
    """Column of the words; guessed when left out."""
    size: PositiveInt | None = None
    """Sides of the pictures in pixels; by default what the pipeline draws."""
    prompts: tuple[str, ...] = ()
    """What is drawn before and after training, to be looked at."""
    prompt_steps: PositiveInt = 30
    """Steps of the sampler for each of these."""


class Denoising(nn.Module):
    """A denoiser with all that it takes to have a loss: the distance from the noise that was put over the latents of a
    picture, or from what else the scheduler says is predicted."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.unet, self.vae, self.text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
        self.scheduler = pipeline.scheduler
        self.vae.requires_grad_(False).eval()
        self.text_encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Denoising:
        """Switch the mode of the denoiser alone: the rest does not learn."""
        self.training = mode
        self.unet.train(mode)
        return self

    def forward(self, pixel_values: Tensor, input_ids: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        """Compute the loss. `return_loss` is a word of the Trainer's: by it, it knows of a loss where there are no
        labels."""
        # Scores draw the same noise each time, so that they can be compared.
        drawn = None if self.training else torch.Generator(pixel_values.device).manual_seed(0)
        with torch.no_grad():
            found = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
            latents = found.sample(drawn) * self.vae.config.scaling_factor
            words = self.text_encoder(input_ids)[0]
        noise = torch.randn(latents.shape, generator=drawn, device=latents.device, dtype=latents.dtype)
        count = self.scheduler.config.num_train_timesteps
        times = torch.randint(count, (len(latents),), generator=drawn, device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, times)
        targets: Mapping[str, Callable[[], Tensor]] = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, times),
            "sample": lambda: latents,
        }
        target = targets[self.scheduler.config.prediction_type]()
        predicted = self.unet(noisy, times, encoder_hidden_states=words).sample
        return {"loss": nn.functional.mse_loss(predicted.float(), target.float())}


class TextToImage(Task[CaptionedData]):
    """The task, scored by the loss."""

    Data = CaptionedData
    packages: ClassVar[Mapping[str, str]] = {"diffusers": "diffusers", "PIL": "pillow", "torchvision": "torchvision"}
    use = Use.PIPELINE

    def prepare(self, run: Run, data: CaptionedData) -> Prepared:
        found = splits(data.train, data.held_out, data.held_out_size)
        image = choose_column(found.train.column_names, data.image, IMAGES, "image", data.train)
        text = choose_column(found.train.column_names, data.text, TEXT_NAMES, "text", data.train)
        pipeline = _pipeline(run)
        side = data.size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        kept = {image: "image", text: "text"}
        train, held_out = (
            part.select_columns(list(kept)).rename_columns(kept) for part in (found.train, found.held_out)
        )
        return Prepared(
            model=Denoising(pipeline),
            adapted=pipeline.unet,
            train=train,
            held_out=held_out,
            collate=lambda rows: _batch(rows, pipeline.tokenizer, side),
            samples=_drawn(pipeline, data, side, run.out / "samples") if data.prompts else None,
        )


def _pipeline(run: Run) -> Any:
    import diffusers

    library: Any = diffusers
    folder = find(run.model).place()
    if not (folder / PIPELINE).is_file():
        raise BadInput(f"{run.model}: no folder of a diffusers pipeline (it has no {PIPELINE})")
    try:
        pipeline = library.DiffusionPipeline.from_pretrained(
            folder, dtype=getattr(torch, run.dtype), local_files_only=True
        )
    except UNREADABLE as error:
        raise unreadable(run.model, "pipeline", error) from error
    if not isinstance(pipeline, library.StableDiffusionPipeline):
        raise BadInput(
            f"{run.model}: is a {type(pipeline).__name__}; pipelines with one text encoder and a UNet can be trained "
            "here (StableDiffusionPipeline), others from Python: peftcore.apply works on any of their parts"
        )
    longest = pipeline.text_encoder.config.max_position_embeddings  # some tokenizers do not know it
    pipeline.tokenizer.model_max_length = min(pipeline.tokenizer.model_max_length, longest)
    pipeline.safety_checker = None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _batch(rows: list[dict[str, Any]], tokenizer: Any, side: int) -> dict[str, Tensor]:
    """Return pictures in -1 .. 1 [rows, 3, side, side], the middle of each, and words."""
    from torchvision.transforms import v2

    fit = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    pictures = torch.stack([fit(row["image"].convert("RGB")) for row in rows]) * 2 - 1
    words = tokenizer(
        [row["text"] for row in rows],
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return {"pixel_values": pictures, "input_ids": words.input_ids}


def _drawn(pipeline: Any, data: CaptionedData, side: int, folder: Path) -> Callable[[], list[str]]:
    """Return a function that draws each prompt from the same noise as before, and says where the pictures are."""

    def draw() -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        training = pipeline.unet.training
        pipeline.unet.eval()
        files = []
        for number, prompt in enumerate(data.prompts):
            noise = torch.Generator().manual_seed(number)
            picture = pipeline(
                prompt, height=side, width=side, num_inference_steps=data.prompt_steps, generator=noise
            ).images[0]
            when = len(list(folder.glob(f"{number}-*.png")))
            files.append(folder / f"{number}-{when}.png")
            if first_process():  # all of them draw, where each holds a part of the model
                picture.save(files[-1])
        pipeline.unet.train(training)
        return [str(file) for file in files]

    return draw
