"""Every diffusion method on a tiny UNet and a tiny SD3: how it learns a new subject, and what it costs the known ones.

Models of diffusers, made from configurations, learn to denoise scikit-learn's digits, each told by two words of which
the second names the digit; one digit they never see, and its word is one that means nothing yet. Then they are adapted
to few images of that digit. Whether it is learned is told by the error of denoising other images of it, and by what a
classifier reads in samples; whether the others are kept, by the same of their words. The floor is the model as it is,
the ceiling full fine-tuning. Methods that are steered by an image are given edges, and have a table of their own.

    python -m benchmarks.diffusion --page                   # all methods that are installed; writes docs/benchmarks.md
    python -m benchmarks.diffusion svdiff --page            # one again, in the place of its former row
    python -m benchmarks.diffusion --models SD3 --page      # on one model again
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn

import peftcore
from benchmarks import adapting, page
from benchmarks.adapting import FULL, RATES, SEEDS, UNADAPTED, Kept, Row, Task
from peftcore.errors import MissingContext, PeftcoreError

COMMAND = "python -m benchmarks.diffusion --page"
BESIDE = ("lora", "dora", "oft", "bitfit")
"""Methods of other plugins to see those of diffusion beside."""
STEPS, BATCH = 80, 16
PRETRAINING, LARGER = 15, 4
"""How many times as many steps a model is trained before, and how many times as large their batches are."""
SUBJECT = 8
"""The digit that is new."""
START, WORDS, WIDTH = 0, 12, 16
"""The word in front, the words that there are, and the width of their embeddings."""
TIMES, SAMPLING = 1000, 12
"""Timesteps of the schedule, and those that a sample is made in."""
SAMPLES = 4
"""Samples of each known digit; of the new one there are as many as of all of them."""
REAL, COLUMNS = "real", 8
"""What the first line of the sheet of samples is called, and how many a line has."""


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] in -1 .. 1, and the digits [n] that they show."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, part: slice | Tensor) -> Digits:
        return Digits(self.images[part], self.labels[part])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """The known digits and the new one, in parts that have no image in common."""

    known: Digits
    known_test: Digits
    subject: Digits
    validation: Digits
    subject_test: Digits
    judge: SVC
    """Reads digits, those of samples too; it learned them from the first half of all images."""
    judged: float
    """How many of the other half it reads rightly."""


@functools.cache
def digits() -> Split:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1
    every = Digits(images, torch.tensor(found.target)[order])
    judge, half = SVC().fit(_flat(every[:900].images), every.labels[:900]), every[900:]
    known, subject = every[every.labels != SUBJECT], every[every.labels == SUBJECT]
    judged = float((read(judge, half.images) == half.labels).float().mean())
    return Split(known[:1400], known[1400:1500], subject[:32], subject[32:72], subject[72:], judge, judged)


def _flat(images: Tensor) -> Any:
    return images.flatten(1).numpy()


def read(judge: SVC, images: Tensor) -> Tensor:
    """Return the digits that a classifier sees."""
    return torch.as_tensor(judge.predict(_flat(images.nan_to_num().clamp(-1, 1))))


def words(labels: Tensor) -> Tensor:
    """Return ids of words [n, 2]. The word of the new digit is the last of the table, as new words are."""
    named = torch.where(labels == SUBJECT, WORDS - 1, labels + 1)
    return torch.stack([torch.full_like(named, START), named], 1)


def edges(images: Tensor) -> Tensor:
    """Return where images change from one pixel to the next, 0 .. 1."""
    across = torch.diff(images, dim=-1, append=images[..., -1:]).abs()
    down = torch.diff(images, dim=-2, append=images[..., -1:, :]).abs()
    return (across + down) / 4


@functools.cache
def schedule() -> Any:
    made = diffusers.DDIMScheduler(num_train_timesteps=TIMES, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    made.set_timesteps(SAMPLING)
    return made


class Painter(nn.Module):
    """A denoiser with the embeddings of words that it is told: called with samples [n, 1, 8, 8], timesteps [n] and
    ids of words [n, 2], it returns the noise."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.words, self.denoiser = nn.Embedding(WORDS, WIDTH), denoiser

    @staticmethod
    def steered(edges: Tensor) -> dict[str, Any]:
        """Return what a call says of edges [n, 1, 8, 8]: an image of the model's own form."""
        return {"condition": edges}


class UNet(Painter):
    """Two resolutions, attention to the words in the higher one and in the middle."""

    def __init__(self) -> None:
        kinds = {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "attention_head_dim": 8}
        ends = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "cross_attention_dim": WIDTH}
        super().__init__(diffusers.UNet2DConditionModel(**kinds, **sizes, **ends))

    def forward(self, sample: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
        noise: Tensor = self.denoiser(sample, timestep, self.words(words)).sample
        return noise

    @staticmethod
    def steered(edges: Tensor) -> dict[str, Any]:
        """As colors eight times as large, as images are beside latents; and as four tokens, a quarter each."""
        large = nn.functional.interpolate(edges, scale_factor=8.0, mode="nearest").expand(-1, 3, -1, -1)
        return {"condition": large, "image_tokens": nn.functional.unfold(edges, 4, stride=4).mT}


class SD3(Painter):
    """Three joint blocks; 16 patches of 2 x 2 pixels beside the words."""

    def __init__(self) -> None:
        sizes = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 3, "caption_projection_dim": 48}
        ends = {"sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1, "pos_embed_max_size": 8}
        text = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
        super().__init__(diffusers.SD3Transformer2DModel(**sizes, **ends, **text))

    def forward(self, sample: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
        text = self.words(words)
        told = {"encoder_hidden_states": text, "pooled_projections": text.mean(1)}
        noise: Tensor = self.denoiser(hidden_states=sample, timestep=timestep, **told).sample
        return noise


HOSTS: dict[str, Callable[[], Painter]] = {"UNet": UNet, "SD3": SD3}


class Painting(Task):
    """To denoise the new digit; methods are told edges where `steers`."""

    def __init__(self, kind: Callable[[], Painter], steps: int) -> None:
        self.kind, self.steers, self.data, self.batch = kind, False, digits().known, LARGER * BATCH
        torch.manual_seed(0)
        self.base = kind()
        self.steered = self.base.steered
        self.steps = PRETRAINING * steps
        adapting.train(self, self.base, None, torch.optim.AdamW(self.base.parameters(), lr=3e-3, weight_decay=0.0))
        self.base.requires_grad_(False)
        self.steps, self.data, self.batch = steps, digits().subject, BATCH
        self.drawn: dict[str, Tensor] = {}
        """Samples of the new digit by the methods that were scored last, of their first seed."""

    def host(self) -> nn.Module:
        model = self.kind()
        model.load_state_dict(self.base.state_dict())
        return model

    def options(self, method: str) -> dict[str, Any]:
        return {}

    def told(self, model: nn.Module, images: Tensor) -> AbstractContextManager[object]:
        """Within it, the model is told the edges of images, if it is told any."""
        if not self.steers or not peftcore.injections(model):
            return nullcontext()
        return peftcore.call(model, **self.steered(edges(images)))

    def loss(self, model: nn.Module) -> Tensor:
        data = self.data[torch.randint(len(self.data), (self.batch,))]
        noise, times = torch.randn_like(data.images), torch.randint(TIMES, (self.batch,))
        return self.wrong(model, data, noise, times, data.images)

    def wrong(self, model: nn.Module, data: Digits, noise: Tensor, times: Tensor, shown: Tensor) -> Tensor:
        """Return the mean squared error of the noise that a model sees, steered by the edges of what is `shown`."""
        with self.told(model, shown):
            seen = model(schedule().add_noise(data.images, noise, times), times, words(data.labels))
        return nn.functional.mse_loss(seen, noise)

    @torch.no_grad()
    def error(self, model: nn.Module, data: Digits, shown: Tensor | None = None) -> float:
        """Return the error at two timesteps of each image, which are the same whatever the model."""
        drawn = torch.Generator().manual_seed(2)
        twice = Digits(data.images.repeat(2, 1, 1, 1), data.labels.repeat(2))
        noise = torch.randn(twice.images.shape, generator=drawn)
        times = torch.linspace(0, TIMES - 1, len(twice)).long()[torch.randperm(len(twice), generator=drawn)]
        seen = twice.images if shown is None else shown.repeat(2, 1, 1, 1)
        return float(self.wrong(model.eval(), twice, noise, times, seen))

    def validate(self, model: nn.Module) -> float:
        return self.error(model, digits().validation)

    @torch.no_grad()
    def samples(self, model: nn.Module, like: Digits) -> Tensor:
        """Return an image for each, of its word (and of its edges)."""
        images = torch.randn(like.images.shape, generator=torch.Generator().manual_seed(3))
        with self.told(model.eval(), like.images):
            for time in schedule().timesteps:
                noise = model(images, time.expand(len(images)), words(like.labels))
                images = schedule().step(noise, time, images).prev_sample
        return images

    def score(self, model: nn.Module, injection: peftcore.Injection | None) -> dict[str, float]:
        split = digits()
        known = [split.known_test[split.known_test.labels == digit][:SAMPLES] for digit in range(10)]
        like = split.subject_test[: sum(len(each) for each in known)]
        asked = Digits(torch.cat([like.images, *(each.images for each in known)]), _labels(like, *known))
        drawn = self.samples(model, asked)
        right = (read(split.judge, drawn) == asked.labels).float()
        found = {
            "error": self.error(model, split.subject_test),
            "read": float(right[: len(like)].mean()),
            "known_error": self.error(model, split.known_test),
            "known_read": float(right[len(like) :].mean()),
        }
        if self.steers:
            found["other_error"] = self.error(model, split.subject_test, split.subject_test.images.roll(1, 0))
        self.drawn.setdefault(FULL if injection is None else injection.method.name, drawn[: len(like)])
        return found


def _labels(*parts: Digits) -> Tensor:
    return torch.cat([part.labels for part in parts])


def steered(task: Painting, methods: Sequence[str]) -> tuple[list[str], list[str], dict[str, PeftcoreError]]:
    """Return the methods that train without an image, those that are told edges, and why others do not act."""
    task.steers = False
    plain, refused = adapting.candidates(task, methods)
    asking = [name for name, error in refused.items() if isinstance(error, MissingContext)]
    task.steers = True
    told, others = adapting.candidates(task, asking)
    return plain, told, {name: error for name, error in (refused | others).items() if name not in told}


def about(task: Painting) -> dict[str, Any]:
    """Return what a table is to be read with."""
    split = digits()
    return {
        "steps": task.steps,
        "total": sum(each.numel() for each in task.base.parameters()),
        "judged": split.judged,
        "images": {
            "train": len(split.subject),
            "validation": len(split.validation),
            "test": len(split.subject_test),
            "known": len(split.known_test),
        },
    }


def section(name: str, kept: Kept) -> list[str]:
    """Return the lines of one model: the table without an image, and the one with edges."""
    rows = kept.sorted("error", greater=False)
    plain = [row for row in rows if "other_error" not in row.scores]
    told = [row for row in rows if "other_error" in row.scores]
    columns = {"error": "error, new", "read": "read, new", "known_error": "error, known", "known_read": "read, known"}
    lines = [f"### {name}", "", f"{kept.about['total']:,} numbers in all.", "", *adapting.table(plain, columns)]
    lines += remarks(plain)
    if told:
        shown = {"error": "error, new", "other_error": "with other edges", **columns}
        lines += ["", "Told the edges of the image that is to be denoised; a sample, those of a held-out image:", ""]
        lines += [*adapting.table(told, shown), *steered_remarks(told)]
    return [*lines, *adapting.not_there(kept.refused), ""]


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return which methods are not above the floor, and which lose the known digits, by this table."""
    floor = next(row for row in rows if row.method == UNADAPTED)
    methods = [row for row in rows if row is not floor]
    return [
        *_named("Not a smaller error of the new digit than the model as it is", methods, "error", floor),
        *_named("A larger error of the known digits than the model as it is", methods, "known_error", floor),
    ]


def _named(what: str, rows: Sequence[Row], score: str, floor: Row) -> list[str]:
    found = [row.called for row in rows if row.mean(score) >= floor.mean(score)]
    return ["", f"{what}: {', '.join(found) if len(found) < len(rows) else 'all'}."] if found else []


def steered_remarks(rows: Sequence[Row]) -> list[str]:
    """Return which methods have no use of the edges, by this table."""
    deaf = [row.called for row in rows if row.mean("other_error") <= row.mean("error")]
    return ["", f"The right edges say no more than others to {', '.join(deaf)}."] if deaf else []


def text(parts: Mapping[str, Kept], found: Mapping[str, str]) -> str:
    """Return all of it as Markdown."""
    told = next(iter(parts.values())).about
    images = told["images"]
    lines = [
        adapting.said(found),
        "",
        f"{told['steps']} steps of {BATCH} of {images['train']} images of the digit {SUBJECT}; {images['validation']} "
        f"others choose the rate, and {images['test']} are in the tables, beside {images['known']} of known digits. "
        f"{len(SEEDS)} seeds. *Error* is the mean squared error of the noise; *read* is which part of "
        f"{SAMPLES * 9} samples of the new digit, and of as many of the known ones, a support vector machine reads as "
        f"what their words say. Of real images it reads {told['judged']:.3f}.",
        "",
    ]
    for name, kept in parts.items():
        lines += section(name, kept)
    lines += [f"![Samples of the digit {SUBJECT} by each method](../benchmarks/diffusion.png)"]
    return "\n".join(lines).rstrip()


def packed(images: Tensor) -> list[str]:
    """Return images as text for the file, a digit of base 16 a pixel."""
    levels = ((images[:COLUMNS].nan_to_num().clamp(-1, 1) + 1) * 7.5).round().int().flatten(1)
    return ["".join(f"{level:x}" for level in image) for image in levels.tolist()]


def picture(parts: Mapping[str, Kept], path: Path) -> None:
    """A sheet of samples for each model, a method a line, in the order of its tables."""
    longest = max(len(kept.rows) for kept in parts.values())
    figure = Figure(figsize=(10, 1.5 + 0.45 * longest), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (name, kept) in zip(panels, parts.items(), strict=True):
        order = [REAL, *(row.method for row in kept.sorted("error", greater=False))]
        drawn = kept.about["samples"]
        lines = [[[int(level, 16) for level in image] for image in drawn[method]] for method in order]
        sheet = torch.tensor(lines).view(len(order), -1, 8, 8)  # [methods, samples, 8, 8]
        framed = nn.functional.pad(sheet, (1, 1, 1, 1), value=15)
        axes.imshow(framed.permute(0, 2, 1, 3).reshape(10 * len(order), -1), cmap="gray_r", vmin=0, vmax=15)
        axes.set(title=name, xticks=[], yticks=[10 * line + 5 for line in range(len(order))])
        axes.set_yticklabels(order, fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.savefig(path)


def measured(
    name: str, steps: int, methods: Sequence[str], former: Kept | None, progress: Progress, keep: Callable[[Kept], None]
) -> Kept:
    """Pretrain a model, and adapt it by each method."""
    bar = progress.add_task(f"{name}: pretraining", total=None)
    task = Painting(HOSTS[name], steps)
    plain, told, refused = steered(task, [method for method in methods if method != FULL])
    plain = [method for method in methods if method == FULL] + plain
    kept = Kept.after(about(task), refused, former)
    drawn = kept.about["samples"] = former.about["samples"] if former else {}
    progress.update(bar, total=(len(plain) + len(told)) * (len(RATES) + len(SEEDS) - 1))
    task.steers = False
    floor = {score: [value] for score, value in task.score(task.host(), None).items()}
    kept.rows[UNADAPTED] = Row(UNADAPTED, 0, 0.0, [0.0], floor)
    drawn |= {REAL: packed(digits().subject_test.images), UNADAPTED: packed(task.drawn.pop(FULL))}
    for task.steers, chosen in ((False, plain), (True, told)):
        for method in chosen:
            progress.update(bar, description=f"{name}: {method}")
            if kept.measure(task, method, lambda: progress.advance(bar)):
                drawn[method] = packed(task.drawn.pop(method))
            keep(kept)
    return kept


def main() -> None:
    """Train, print, write."""
    parser = adapting.parser("diffusion", __doc__)
    parser.add_argument("--models", nargs="+", choices=HOSTS, default=[*HOSTS], help="some of them; others stay")
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = given.root / "benchmarks/diffusion.json"
    methods = given.methods or [FULL, *adapting.of_category("diffusion", BESIDE)]
    parts, found = adapting.read(file), adapting.circumstances(diffusers=diffusers.__version__)

    def keep(name: str, kept: Kept) -> None:
        """Put a model's rows among the others'; what is interrupted has what it measured."""
        parts[name] = kept
        if given.page:
            adapting.write(file, parts, found)

    with Progress(console=Console(stderr=True)) as progress:
        for name in given.models:
            former = parts.get(name) if given.methods else None
            keep(name, measured(name, given.steps or STEPS, methods, former, progress, functools.partial(keep, name)))
    parts = {name: parts[name] for name in HOSTS if name in parts}
    told = text(parts, found)
    print(told)
    if given.page:
        picture(parts, file.with_suffix(".png"))
        page.write(COMMAND, told, page=given.root / "docs/benchmarks.md")


if __name__ == "__main__":
    main()
