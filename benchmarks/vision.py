"""Every vision method on one small ViT: what it learns of new digits, and what it costs the ones known before.

timm's ViT, made from a configuration, learns to read the digits 0 to 4 of scikit-learn. Then it is adapted to 5 to 9,
which lie on their side under noise. Its head trains along with each method, from the values that it has; the floor is
the head alone (`linear_probe`), the ceiling full fine-tuning. What is kept is read with the adapter in place by the old
head: upright digits 0 to 4. Removed, an adapter has to leave the very logits of before.

    python -m benchmarks.vision --page              # all methods that are installed; writes docs/benchmarks.md
    python -m benchmarks.vision vpt_deep --page     # one again, in the place of its former row
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor, nn

import peftcore
from benchmarks import adapting, page
from benchmarks.adapting import FULL, RATES, SEEDS, Kept, Row, Task

COMMAND = "python -m benchmarks.vision --page"
BESIDE = ("lora", "bitfit", "ln_tuning", "linear_probe")
"""Methods of other plugins to see those of vision beside."""
STEPS, BATCH = 200, 32
PRETRAINING = 5
"""How many times as many steps the model is trained before."""
CLASSES = 5
HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] in -1 .. 1, and their labels from 0 on."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, part: slice) -> Digits:
        return Digits(self.images[part], self.labels[part])

    def __len__(self) -> int:
        return len(self.labels)

    def corrupted(self) -> Digits:
        """The same digits on their side, under noise that is always the same."""
        noise = 0.2 * torch.randn(self.images.shape, generator=torch.Generator().manual_seed(1))
        return Digits(torch.rot90(self.images, 1, (-2, -1)) + noise, self.labels)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels that torch's generator draws."""
        chosen = torch.randint(len(self), (BATCH,))
        return self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Split:
    """What is known and what is new, each in parts that have no image in common."""

    known: Digits
    known_test: Digits
    new: Digits
    validation: Digits
    new_test: Digits


@functools.cache
def digits() -> Split:
    """The digits 0 to 4, and 5 to 9 on their side."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1, torch.tensor(found.target)
    labels, old = labels[order], labels[order] < CLASSES
    known = Digits(images[old], labels[old])
    new = Digits(images[~old], labels[~old] - CLASSES).corrupted()
    return Split(known[:600], known[600:], new[:400], new[400:550], new[550:])


def vit() -> nn.Module:
    """Make a model of 16 patches of 2 x 2 pixels."""
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": CLASSES, "embed_dim": 64, "depth": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_heads=4, **sizes)
    return model


class Reading(Task):
    """To read the new digits."""

    def __init__(self, steps: int) -> None:
        self.steps, self.data = steps, digits().known
        torch.manual_seed(0)
        self.base = vit()
        optimizer = torch.optim.AdamW(self.base.parameters(), lr=3e-3, weight_decay=0.0)
        self.steps = PRETRAINING * steps
        adapting.train(self, self.base, None, optimizer)
        self.base.requires_grad_(False)
        self.steps, self.data = steps, digits().new
        self.head = {name: self.base.get_parameter(name).clone() for name in HEAD}
        self.before = logits(self.base, digits().known_test)

    def host(self) -> nn.Module:
        model = vit()
        model.load_state_dict(self.base.state_dict())
        return model

    def options(self, method: str) -> dict[str, Any]:
        found: dict[str, Any] = {"train": ["head"]}
        if peftcore.method(method).asks_for_data(found):
            found["data"] = [lambda model: nn.functional.cross_entropy(model(self.data.images), self.data.labels)]
        return found

    def loss(self, model: nn.Module) -> Tensor:
        images, labels = self.data.batch()
        return nn.functional.cross_entropy(model(images), labels)

    def validate(self, model: nn.Module) -> float:
        data = digits().validation
        return float(nn.functional.cross_entropy(logits(model, data), data.labels))

    def score(self, model: nn.Module, injection: peftcore.Injection | None) -> dict[str, float]:
        found = {"accuracy": accuracy(model, digits().new_test)}
        with self.old_head(model, injection):
            found["kept"] = accuracy(model, digits().known_test)
        if injection is not None:
            injection.remove()
            found["restored"] = float(torch.equal(logits(model, digits().known_test), self.before))
        return found

    @contextmanager
    def old_head(self, model: nn.Module, injection: peftcore.Injection | None) -> Iterator[None]:
        """Within it, the head has the values of before, whatever was trained."""
        trained: dict[str, Tensor]
        if injection is None:
            trained = {name: model.get_parameter(name) for name in HEAD}
        else:
            own = injection.state_dict()
            trained = {name: own[f"{name.removesuffix('.weight')}.value"] for name in HEAD}
        learned = {name: value.detach().clone() for name, value in trained.items()}
        _fill(trained, self.head)
        try:
            yield
        finally:
            _fill(trained, learned)


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


@torch.no_grad()
def logits(model: nn.Module, data: Digits) -> Tensor:
    """Return what a model says of images, [n, classes]."""
    found: Tensor = model.eval()(data.images)
    return found


def accuracy(model: nn.Module, data: Digits) -> float:
    return float((logits(model, data).argmax(-1) == data.labels).float().mean())


def about(task: Reading) -> dict[str, Any]:
    """Return what the table is to be read with."""
    split = digits()
    commonest = int(split.new_test.labels.bincount().max())
    return {
        "steps": task.steps,
        "known": accuracy(task.base, split.known_test),
        "unadapted": accuracy(task.base, split.new_test),
        "commonest": commonest / len(split.new_test),
        "images": {"train": len(split.new), "validation": len(split.validation), "test": len(split.new_test)},
        "head": sum(each.numel() for each in task.head.values()),
        "total": sum(each.numel() for each in task.base.parameters()),
    }


def text(kept: Kept, found: Mapping[str, str]) -> str:
    """Return all of it as Markdown."""
    told, rows = kept.about, kept.sorted("accuracy", greater=True)
    images = told["images"]
    lines = [
        adapting.said(found),
        "",
        f"Chance is {1 / CLASSES:.3f}, the commonest digit {told['commonest']:.3f}; before, the model reads "
        f"{told['unadapted']:.3f} of the new digits and {told['known']:.3f} of those that it knows. {told['steps']} "
        f"steps of {BATCH} of {images['train']} images; {images['validation']} others choose the rate, and "
        f"{images['test']} are in the table. {len(SEEDS)} seeds. Of what trains, {told['head']} numbers are the head; "
        f"the model has {told['total']:,}.",
        "",
        *adapting.table(rows, {"accuracy": "accuracy, new digits", "kept": "accuracy, known digits"}),
        "",
        "![Accuracy on new digits over trainable parameters](../benchmarks/vision.png)",
        "",
        " ".join(filter(None, (remarks(rows, told), restored(rows)))),
        *adapting.not_there(kept.refused),
    ]
    return "\n".join(lines).rstrip()


def remarks(rows: list[Row], told: Mapping[str, Any]) -> str:
    """Return which methods are not above the floor, and which read the known digits worst, by this table."""
    said = []
    floor = next((row for row in rows if row.method == "linear_probe"), None)
    if floor is not None:
        below = [row for row in rows if row is not floor and row.mean("accuracy") <= floor.mean("accuracy")]
        names = ", ".join(row.called for row in below)
        said.append(f"Not better than the head alone: {names}." if below else "All are better than the head alone.")
    half = [row.called for row in rows if row.mean("kept") < told["known"] / 2]
    if half:
        said.append(f"With these in place, less than half of what was known is read: {', '.join(half)}.")
    return " ".join(said)


def restored(rows: list[Row]) -> str:
    """Return whether all adapters, removed, left the model as it was."""
    wrong = [row.called for row in rows if row.method != FULL and min(row.scores["restored"]) < 1]
    if wrong:
        return f"Removed, these did not leave the logits of before: {', '.join(wrong)}."
    return "Removed, each adapter left the logits of before for all known digits in the test, bit for bit."


def picture(kept: Kept, path: Path) -> None:
    """Accuracy over trainable parameters, with deviations; in color what is kept."""
    rows = list(kept.rows.values())
    figure = Figure(figsize=(9, 5.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    x, y = [row.trainable for row in rows], [row.mean("accuracy") for row in rows]
    errors = [statistics.stdev(row.scores["accuracy"]) for row in rows]
    axes.errorbar(x, y, errors, fmt="none", ecolor="0.7", zorder=1)
    dots = axes.scatter(x, y, c=[row.mean("kept") for row in rows], cmap="viridis", zorder=2)
    for row, across, up in zip(rows, x, y, strict=True):
        axes.annotate(row.method, (across, up), (5, 3), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="trainable parameters (log scale)", ylabel="accuracy, new digits")
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(dots, label="accuracy, known digits")
    figure.savefig(path)


def main() -> None:
    """Train, print, write."""
    given = adapting.parser("vision", __doc__).parse_args()
    torch.set_num_threads(1)
    file = given.root / "benchmarks/vision.json"
    task = Reading(given.steps or STEPS)
    names = given.methods or [FULL, *adapting.of_category("vision", BESIDE)]
    there, refused = adapting.candidates(task, [name for name in names if name != FULL])
    there = [name for name in names if name == FULL] + there
    former = adapting.read(file).get("vit") if given.methods else None
    kept = Kept.after(about(task), refused, former)
    found = adapting.circumstances(timm=timm.__version__)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(there) * (len(RATES) + len(SEEDS) - 1))
        for name in there:
            progress.update(bar, description=name)
            kept.measure(task, name, lambda: progress.advance(bar))
            if given.page:
                adapting.write(file, {"vit": kept}, found)  # what is interrupted has what it measured
    told = text(kept, found)
    print(told)
    if given.page:
        picture(kept, file.with_suffix(".png"))
        page.write(COMMAND, told, page=given.root / "docs/benchmarks.md")


if __name__ == "__main__":
    main()
