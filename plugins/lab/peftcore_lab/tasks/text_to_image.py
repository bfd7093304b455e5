"""The task of pictures and their captions: a part of a pipeline like Stable Diffusion or Flux is adapted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

import peftcore
from peftcore.errors import BadInput
from peftcore.models.configurations import PIPELINE
from peftcore.models.loading import UNREADABLE, unreadable
from peftcore.models.model_names import Use, find
from peftcore_lab.data.columns import TEXT_NAMES, choose_column
from peftcore_lab.data.example_sources import splits
from peftcore_lab.runs.folder import first_process
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks._painters import Painter, TextEncoder, kinds
from peftcore_lab.tasks.image_classification import IMAGES
from peftcore_lab.tasks.task import CompanionAdapter, Data, Prepared, Task, Work

SHEET, CELL = "samples.png", 160
"""The file that shows all drawings, and the sides of one in it."""
WORDS_METHOD = "textual_inversion"
"""The method of words that are learned together with the denoiser."""
CONDITIONS = ("condition", "conditioning_image", "control")


class CaptionedData(Data):
    """Options of the data: a column of pictures, and one of their captions."""

    image: str | None = None
    """Column of the pictures; guessed when left out."""
    text: str | None = None
    """Column of the words; guessed when left out."""
    condition: str | None = None
    """Column of pictures that show the layout (edges, depth), for methods that take one, like
    ``controlnet``."""
    size: PositiveInt | None = None
    """Sides of the pictures in pixels; by default what the pipeline draws."""
    part: Literal["denoiser", "text_encoder"] = "denoiser"
    """The part that is adapted; of several text encoders the first."""
    words: tuple[str, ...] = ()
    """New words, which tokenizers learn before training. With ``part=text_encoder`` the method trains their vectors
    (``textual_inversion``); otherwise all text encoders learn them together with the denoiser (pivotal tuning). The
    tokenizers that know them are in the run's folder."""
    words_from: str | None = None
    """A known word that the new ones are like: they begin as its vector, of several tokens as the mean."""
    words_rate: PositiveFloat | None = None
    """Learning rate of words that are learned together with the denoiser; by default that of the run."""
    words_until: float = Field(1.0, gt=0, le=1)
    """The share of all steps after which these words stay as they are, and the denoiser learns on."""
    prior: Path | None = None
    """Folder of pictures of the class of the learned subject, each paired with one of `train` in every batch, so that
    the class stays what it is (DreamBooth). The model draws those that are missing, before training."""
    prior_text: str | None = None
    """The text of the pictures of the class: a dog, where ``sks dog`` is learned."""
    prior_images: PositiveInt = 100
    """Number of pictures of the class."""
    prior_weight: PositiveFloat = 1.0
    """Weight of the pictures of the class in the loss."""
    min_snr: PositiveFloat | None = None
    """The largest weight of a step of the diffusion (5 in the paper); without it, all errors of noise count alike."""
    guidance: NonNegativeFloat = 3.5
    """Guidance scale that models distilled from guidance (Flux) are given in training."""
    prompts: tuple[str, ...] = ()
    """Prompts that are drawn before and after training, to be looked at."""
    prompts_during: bool = False
    """Draw them at each score too."""
    prompt_conditions: tuple[Path, ...] = ()
    """A picture for each prompt, if the method takes one."""
    prompt_steps: PositiveInt = 30
    """Steps of the sampler for each picture."""

    @model_validator(mode="after")
    def _fit(self) -> CaptionedData:
        if (self.prior is None) != (self.prior_text is None):
            raise ValueError("set prior (a folder of pictures) and prior_text (their caption) together")
        if self.prior is not None and self.condition is not None:
            raise ValueError("pictures of prior have no condition: remove prior or condition")
        if self.prompt_conditions and len(self.prompt_conditions) != len(self.prompts):
            raise ValueError("prompt_conditions needs one picture for each of prompts")
        if not self.words and {"words_from", "words_rate", "words_until"} & self.model_fields_set:
            raise ValueError("words_from, words_rate and words_until configure new words: set words too")
        if self.part == "text_encoder" and {"words_rate", "words_until"} & self.model_fields_set:
            raise ValueError(
                "words_rate and words_until need words that are learned together with the denoiser: remove "
                "part=text_encoder"
            )
        return self

    @property
    def pivotal(self) -> bool:
        """Return whether words are learned together with the denoiser."""
        return bool(self.words) and self.part == "denoiser"


class Denoising(nn.Module):
    """A pipeline with its loss: the distance of its denoiser's output from the target for noisy latents."""

    def __init__(self, painter: Painter, data: CaptionedData) -> None:
        super().__init__()
        self.denoiser, self.vae = painter.denoiser, painter.pipeline.vae
        self.encoders = nn.ModuleList(painter.encoders)
        self._painter, self._noise, self._part = painter, painter.noise(data.min_snr), data.part
        self._reads = data.part == "text_encoder" or data.pivotal
        for each in (self.denoiser, self.vae, *self.encoders):
            each.requires_grad_(each is self.learner).eval()

    @property
    def learner(self) -> nn.Module:
        """Return the part that is adapted."""
        return self.denoiser if self._part == "denoiser" else self.encoders[0]

    def train(self, mode: bool = True) -> Denoising:
        """Switch the mode of the trained parts only."""
        self.training = mode
        self.learner.train(mode)
        return self

    def forward(
        self,
        pixel_values: Tensor,
        sizes: Tensor,
        weight: Tensor,
        texts: list[str],
        condition: Tensor | None = None,
        return_loss: bool = True,
    ) -> dict[str, Tensor]:
        """Compute the loss.

        Args:
            pixel_values: pictures [rows, 3, side, side] in -1 .. 1.
            sizes: see `Painter.words`.
            weight: the share of each row in the loss [rows].
            texts: the caption of each.
            condition: pictures [rows, 3, side, side] in 0 .. 1 for methods that take one.
            return_loss: a word of the Trainer's; by it, it knows of a loss where there are no labels.
        """
        # Scores draw the same noise each time, so that they can be compared.
        drawn = None if self.training else torch.Generator(pixel_values.device).manual_seed(0)
        with torch.no_grad():
            noised = self._noise.over(self._painter.latents(pixel_values, drawn), drawn)
        with nullcontext() if self._reads else torch.no_grad():
            words = self._painter.words(texts, sizes)
        with nullcontext() if condition is None else peftcore.call(self.denoiser, condition=condition):
            said = self._painter.denoise(noised.latents, noised.times, words)
        errors = (said.float() - noised.target.float()).square().flatten(1).mean(1)  # [rows]
        return {"loss": (weight * noised.weight * errors).sum()}


class TextToImage(Task[CaptionedData]):
    """The task, scored by the loss."""

    Data = CaptionedData
    packages: ClassVar = {"diffusers": "diffusers", "PIL": "pillow", "torchvision": "torchvision"}
    use = Use.PIPELINE

    def prepare(self, run: Run, data: CaptionedData) -> Prepared:
        found = splits(data.train, data.held_out, data.held_out_size)
        columns = found.train.column_names
        kept = {
            choose_column(columns, data.image, IMAGES, "image", data.train): "image",
            choose_column(columns, data.text, TEXT_NAMES, "text", data.train): "text",
        }
        if data.condition is not None:
            kept[choose_column(columns, data.condition, CONDITIONS, "condition", data.train)] = "condition"
        train, held_out = (
            part.select_columns(list(kept)).rename_columns(kept) for part in (found.train, found.held_out)
        )
        painter = _painter(run, data)
        beside = _learn_words(painter, data, run.out)
        side, model = data.size or painter.side, Denoising(painter, data)
        return Prepared(
            model=model,
            adapted=model.learner,
            beside=beside,
            train=train if data.prior is None else WithPrior(train, _files(data.prior, data.prior_images), data),
            held_out=held_out,
            collate=lambda rows: _batch(rows, side, data.prior_weight),
            samples=_drawn(painter, data, side, run.out) if data.prompts else None,
            during=data.prompts_during,
            picture=run.out / SHEET if data.prompts else None,
            first=_missing(painter, data, side),
        )


def _painter(run: Run, data: CaptionedData) -> Painter:
    import diffusers

    library: Any = diffusers
    folder = find(run.model).place()
    if not (folder / PIPELINE).is_file():
        raise BadInput(f"{run.model} is not the folder of a diffusers pipeline (it has no {PIPELINE})")
    try:
        pipeline = library.DiffusionPipeline.from_pretrained(
            folder, dtype=getattr(torch, run.dtype), local_files_only=True
        )
    except UNREADABLE as error:
        raise unreadable(run.model, "pipeline", error) from error
    known = kinds()
    if type(pipeline) not in known:
        names = ", ".join(each.__name__ for each in known)
        raise BadInput(
            f"{run.model} is a {type(pipeline).__name__}; this task trains {names}. For another pipeline, call "
            "peftcore.apply on one of its parts in Python"
        )
    pipeline.set_progress_bar_config(disable=True)
    return known[type(pipeline)](pipeline, data.guidance)


def _learn_words(painter: Painter, data: CaptionedData, out: Path) -> tuple[CompanionAdapter, ...]:
    """Give tokenizers new words, and their encoders a vector for each: all of them, or the encoder that is adapted.
    Return the adapters that train the words beside the denoiser's.

    Raises:
        BadInput: one of them is a word already, or what they are like is none.
    """
    if not data.words:
        return ()
    readers = painter.readers if data.pivotal else {"": painter.readers[""]}
    starts = {number: _start(reader, data) for number, reader in readers.items()}
    beside = []
    for number, reader in readers.items():
        tokens = _taught(reader, data, starts[number])
        if first_process():
            reader.tokenizer.save_pretrained(out / f"tokenizer{number}")
        own = CompanionAdapter(
            name=f"text_encoder{number}",
            part=reader.encoder,
            method=WORDS_METHOD,
            options={"tokens": tokens, "words": list(data.words)},
            learning_rate=data.words_rate,
            until=data.words_until,
            files={f"{reader.file}.safetensors": f"embeddings/{reader.file}"},
        )
        beside.append(own)
    return tuple(beside) if data.pivotal else ()


def _start(reader: TextEncoder, data: CaptionedData) -> Tensor | None:
    """Return the vector [width] from which new words start; None leaves it to the encoder."""
    tokenizer = reader.tokenizer
    if held := tokenizer.get_vocab().keys() & {*data.words}:
        raise BadInput(f"data.words: the tokenizer has {min(held)!r} already; choose another word")
    if data.words_from is None:
        return None
    ids = tokenizer(data.words_from, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise BadInput(f"data.words_from: the tokenizer has no tokens for {data.words_from!r}")
    table: Tensor = reader.encoder.get_input_embeddings().weight.detach()
    return table[ids].mean(0)


def _taught(reader: TextEncoder, data: CaptionedData, start: Tensor | None) -> list[int]:
    """Return the tokens of new words."""
    encoder, tokenizer, words = reader.encoder, reader.tokenizer, list(data.words)
    tokenizer.add_tokens(words)
    # Some tables have more rows than their tokenizer has tokens. Those stay, unless the method may count from the end.
    rows = len(encoder.get_input_embeddings().weight) if data.pivotal else 0
    encoder.resize_token_embeddings(max(len(tokenizer), rows))
    tokens: list[int] = tokenizer.convert_tokens_to_ids(words)
    if start is not None:
        encoder.get_input_embeddings().weight.data[tokens] = start
    return tokens


class WithPrior:
    """Rows, each paired with a picture of the class. The shorter list starts over when it ends."""

    def __init__(self, rows: Any, files: Sequence[Path], data: CaptionedData) -> None:
        self._rows, self._files, self._text = rows, files, data.prior_text

    def __len__(self) -> int:
        return max(len(self._rows), len(self._files))

    def __getitem__(self, index: int) -> dict[str, Any]:
        beside = {"image": _opened(self._files[index % len(self._files)]), "text": self._text}
        return {**self._rows[index % len(self._rows)], "prior": beside}


def _files(folder: Path, count: int) -> list[Path]:
    return [folder / f"{number}.png" for number in range(count)]


def _opened(path: Path) -> Any:
    """Read a picture.

    Raises:
        BadInput: it is none.
    """
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise BadInput(f"{path} cannot be read as a picture: {error}") from error


def _missing(painter: Painter, data: CaptionedData, side: int) -> Work | None:
    """Return the work of drawing pictures of the class that are not there."""
    if data.prior is None:
        return None
    folder, text = data.prior, data.prior_text
    missing = [file for file in _files(folder, data.prior_images) if not file.is_file()]

    def draw(tick: Callable[[], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in missing:
            picture = _draw(painter, data, side, str(text), seed=int(file.stem))
            if first_process():
                picture.save(file)
            tick()

    return Work("pictures of the class", len(missing), draw) if missing else None


def _draw(
    painter: Painter, data: CaptionedData, side: int, prompt: str, seed: int, condition: Tensor | None = None
) -> Any:
    noise = torch.Generator().manual_seed(seed)
    with nullcontext() if condition is None else peftcore.call(painter.denoiser, condition=condition):
        found = painter.pipeline(
            prompt, height=side, width=side, num_inference_steps=data.prompt_steps, generator=noise
        )
    return found.images[0]


def _picture(image: Any, side: int) -> tuple[Tensor, list[int]]:
    """Return the middle of a picture [3, side, side] in 0 .. 1, and its sizes (see `Painter.words`)."""
    from torchvision.transforms import v2

    scaled = v2.functional.resize(v2.functional.to_image(image.convert("RGB")), [side])
    top, left = ((length - side) // 2 for length in scaled.shape[-2:])
    middle = v2.functional.to_dtype(scaled[:, top : top + side, left : left + side], torch.float32, scale=True)
    return middle, [image.height, image.width, top, left, side, side]


def _batch(rows: list[dict[str, Any]], side: int, prior_weight: float) -> dict[str, Any]:
    """Return what `Denoising` takes. Pictures of the class come behind those of the rows."""
    beside = [row["prior"] for row in rows if "prior" in row]
    pictures, sizes = zip(*(_picture(row["image"], side) for row in (*rows, *beside)), strict=True)
    weight = torch.tensor([1.0] * len(rows) + [prior_weight] * len(beside)) / len(rows)
    batch = {
        "pixel_values": torch.stack(pictures) * 2 - 1,
        "sizes": torch.tensor(sizes),
        "weight": weight,
        "texts": [str(row["text"]) for row in (*rows, *beside)],
    }
    if "condition" in rows[0]:
        batch["condition"] = torch.stack([_picture(row["condition"], side)[0] for row in rows])
    return batch


def _drawn(painter: Painter, data: CaptionedData, side: int, out: Path) -> Callable[[], list[str]]:
    """Return a function that draws each prompt from the same noise as before, and says where the pictures are."""
    pictures = [_picture(_opened(path), side)[0][None] for path in data.prompt_conditions]
    told: Sequence[Tensor | None] = pictures or [None] * len(data.prompts)
    folder = out / "samples"

    def draw() -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        parts = [painter.denoiser, *painter.encoders]
        training = [part.training for part in parts]
        for part in parts:
            part.eval()
        files = []
        for number, (prompt, condition) in enumerate(zip(data.prompts, told, strict=True)):
            picture = _draw(painter, data, side, prompt, number, condition)
            files.append(folder / f"{number}-{len(_drawn_before(folder, number))}.png")
            if first_process():  # all of them draw, where each holds a part of the model
                picture.save(files[-1])
        if first_process():
            _show([_drawn_before(folder, number) for number in range(len(data.prompts))], out / SHEET)
        for part, mode in zip(parts, training, strict=True):
            part.train(mode)
        return [str(file) for file in files]

    return draw


def _drawn_before(folder: Path, prompt: int) -> list[Path]:
    found = folder.glob(f"{prompt}-*.png")
    return sorted(found, key=lambda file: int(file.stem.partition("-")[2]))


def _show(drawn: Sequence[Sequence[Path]], path: Path) -> None:
    """Write one picture of all: a row for each prompt, from left to right as training went."""
    from torchvision.transforms import v2
    from torchvision.utils import save_image

    fit = v2.Compose([v2.ToImage(), v2.Resize([CELL, CELL]), v2.ToDtype(torch.float32, scale=True)])
    save_image([fit(_opened(file)) for row in drawn for file in row], path, nrow=len(drawn[0]))
