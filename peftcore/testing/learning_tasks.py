"""Small real tasks. In each, a host that was pretrained on one kind of data has to learn another kind.

- A classifier of scikit-learn's handwritten digits learns digits that are rotated by 90 degrees.
- A language model of Python's documentation learns the text with upper and lower case exchanged.
- A CLIP that matches pictures with names learns rotated pictures.
- A denoiser of digits learns their negatives.

All random numbers are seeded. Each host is pretrained once on a machine (see `trained_once`).
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.surgery.seeding import preserved_rng
from peftcore.testing.kit import NotApplicable
from peftcore.testing.trained_once import trained_once

Batch = dict[str, Tensor]
STEPS = 80
"""The number of training steps of every adaptation."""
PICTURE = "picture"
"""The key in a batch for pictures that some methods need as arguments of ``peftcore.call``. Only some tasks have it."""
HELD_OUT = -1
"""The index of the batch on which scores are computed; training batches are 0, 1, 2, …"""


@dataclass(frozen=True)
class LearningTask:
    """One task to learn.

    Attributes:
        pretrained: returns a fresh copy of the pretrained host, in eval mode.
        batch: returns batch i of the new data.
        loss: returns the loss of a host on a batch.
        score: returns the score of a host on a validation batch; higher is better.
    """

    name: str
    pretrained: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module, Batch], float]

    def scored(self, model: nn.Module) -> float:
        """Return the score of a model on data that was not used for training."""
        with torch.no_grad():
            return self.score(model.eval(), self.batch(HELD_OUT))

    def learn(self, model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, steps: int = STEPS) -> None:
        """Train a model for `steps` steps, on batches with the indices `first`, ``first + 1``, and so on."""
        model.train()
        for step in range(first, first + steps):
            optimizer.zero_grad()
            self.loss(model, self.batch(step)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval()


def _needs(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise NotApplicable(f"this task needs {library}, which is not installed ({error})") from None


def _drawn(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number + 1)


@functools.cache
def _recipe() -> str:
    """Return the source text of this module, which determines the weights of pretrained hosts."""
    return inspect.getsource(sys.modules[__name__])


def _learned(
    name: str, make: Callable[[], nn.Module], loss: Callable[[nn.Module, int], Tensor], lr: float
) -> nn.Module:
    """Return a host that was pretrained on the first kind of data. The state of torch's global random generator does
    not change."""

    def train() -> dict[str, Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        for step in range(400):
            optimizer.zero_grad()
            loss(model, step).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.zero_grad()
        return model.state_dict()

    with preserved_rng():
        torch.default_generator.manual_seed(0)
        model = make().train()
        model.load_state_dict(trained_once(name, _recipe(), train, like=model.state_dict()))
    return model.eval().requires_grad_(True)


# ---------------------------------------------------------------- handwriting


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """Return images [1797, 1, 8, 8] in -1 .. 1 and their labels, in random order; the last 597 are held out."""
    found = _needs("sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=_drawn(0))
    return torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1, torch.tensor(found.target)[order]


def _scans(number: int) -> tuple[Tensor, Tensor]:
    images, labels = _digits()
    if number == HELD_OUT:
        return images[1200:], labels[1200:]
    chosen = torch.randint(1200, (64,), generator=_drawn(number))
    return images[chosen], labels[chosen]


def _turned(number: int) -> Batch:
    images, labels = _scans(number)
    return {"pixel_values": torch.rot90(images, 1, (-2, -1)), "labels": labels}


def _classified(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = nn.functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
    return loss


def _accuracy(model: nn.Module, batch: Batch) -> float:
    chosen = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    right: float = (chosen == batch["labels"]).float().mean().item()
    return right


@functools.cache
def _classifier() -> nn.Module:
    library = _needs("transformers")
    config = library.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=10,
    )

    def upright(model: nn.Module, step: int) -> Tensor:
        images, labels = _scans(step)
        return _classified(model, {"pixel_values": images, "labels": labels})

    return _learned("digits", lambda: library.ViTForImageClassification(config), upright, 2e-3)


# ---------------------------------------------------------------- text


@functools.cache
def _manual() -> Tensor:
    """Return the bytes of the Python language reference, which is included in every Python."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return torch.tensor(list("\n".join(topics.values()).encode("ascii", "ignore")[:300_000]))


def _passages(number: int, length: int = 48) -> Tensor:
    held = number == HELD_OUT
    first, last = (200_000, 300_000 - length) if held else (0, 200_000)
    starts = torch.randint(first, last, (64 if held else 32, 1), generator=_drawn(number))
    return _manual()[starts + torch.arange(length)]


def _exchanged(number: int) -> Batch:
    """Return a batch of passages of text with upper and lower case exchanged."""
    text = _passages(number)
    letter = ((text | 32) >= ord("a")) & ((text | 32) <= ord("z"))
    return {"input_ids": torch.where(letter, text ^ 32, text)}


def _continued(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    return loss


@functools.cache
def _writer() -> nn.Module:
    library = _needs("transformers")
    config = library.LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return _learned(
        "text",
        lambda: library.LlamaForCausalLM(config),
        lambda m, step: _continued(m, {"input_ids": _passages(step)}),
        4e-3,
    )


# ---------------------------------------------------------------- a denoiser


def _noised(number: int, sign: float = -1.0) -> Batch:
    """Return a batch for the denoiser: negatives of digits with noise added, the timesteps, embeddings for the labels,
    the noise, and the pictures without noise."""
    images, labels = (each[: 128 if number == HELD_OUT else 24] for each in _scans(number))
    drawn = _drawn(number)
    noise = torch.randn(images.shape, generator=drawn)
    times = torch.randint(1000, (len(images),), generator=drawn)
    signal = torch.cos(times / 1000 * torch.pi / 2).view(-1, 1, 1, 1)
    words = torch.randn(10, 4, 16, generator=_drawn(0))[labels]
    mixed = signal * sign * images + (1 - signal**2).sqrt() * noise
    picture = nn.functional.interpolate(sign * images, scale_factor=2)  # for methods that are told a condition
    inputs = {"sample": mixed, "timestep": times, "encoder_hidden_states": words}
    return {**inputs, "noise": noise, PICTURE: picture}


def _denoised(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name not in ("noise", PICTURE)}
    loss: Tensor = nn.functional.mse_loss(model(**inputs).sample, batch["noise"])
    return loss


@functools.cache
def _denoiser() -> nn.Module:
    library = _needs("diffusers")

    def make() -> nn.Module:
        model: nn.Module = library.UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        return model

    return _learned("denoiser", make, lambda model, step: _denoised(model, _noised(step, sign=1.0)), 4e-3)


# ---------------------------------------------------------------- pictures and their names


PLACES = 4
"""The number of placeholder words before each name, which a method may replace by learned embeddings."""


def _named(number: int, turned: bool = True) -> Batch:
    """Return a batch with pictures of digits, their labels, and ten texts. Each text is a start token, placeholder
    words, the name of a digit, and an end token."""
    images, labels = _scans(number)
    names = torch.arange(4, 14).view(10, 1)
    texts = torch.cat([torch.full((10, 1), 1), torch.full((10, PLACES), 3), names, torch.full((10, 1), 2)], 1)
    return {
        "pixel_values": torch.rot90(images, 1, (-2, -1)) if turned else images,
        "input_ids": texts,
        "labels": labels,
    }


def _matches(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"]).logits_per_image
    return logits


def _matched(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(_matches(model, batch), batch["labels"])


def _right(model: nn.Module, batch: Batch) -> float:
    right: float = (_matches(model, batch).argmax(-1) == batch["labels"]).float().mean().item()
    return right


@functools.cache
def _matcher() -> nn.Module:
    library = _needs("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": 16, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = library.CLIPConfig(
        text_config={**shape, **words},
        vision_config={**shape, "image_size": 8, "patch_size": 2, "num_channels": 1},
        projection_dim=32,
    )
    return _learned("names", lambda: library.CLIPModel(config), lambda m, step: _matched(m, _named(step, False)), 2e-3)


def _copies(of: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(of())


TASKS: Iterable[LearningTask] = (
    LearningTask("digits", _copies(_classifier), _turned, _classified, _accuracy),
    LearningTask(
        "text", _copies(_writer), _exchanged, _continued, lambda model, batch: -_continued(model, batch).item()
    ),
    LearningTask("names", _copies(_matcher), _named, _matched, _right),
    LearningTask(
        "denoiser", _copies(_denoiser), _noised, _denoised, lambda model, batch: -_denoised(model, batch).item()
    ),
)
"""All tasks; a method is checked on the first one that it can be applied to."""


@functools.cache
def full_fine_tuning(task: LearningTask) -> float:
    """Return the score of full fine-tuning with the same number of steps, at the best of three learning rates."""

    def train() -> dict[str, Tensor]:
        scores = []
        for lr in (1e-3, 3e-3, 1e-2):
            model = task.pretrained()
            task.learn(model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0))
            scores.append(task.scored(model))
        return {"score": torch.tensor(max(scores), dtype=torch.float64)}

    like = {"score": torch.zeros((), dtype=torch.float64)}
    return trained_once(f"{task.name}-fine-tuned", _recipe(), train, like)["score"].item()
