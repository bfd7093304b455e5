"""Denoisers that draw digits learn to draw them in another style, and to follow edges.

python examples/digits-diffusion/run.py writes unet.png, dit.png, edges.png and results.json beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import peftcore
from hosts import BATCH_SIZE, HELD_OUT, HOSTS, SEED, Denoiser, Reader, digits, draw, edges, faded_italics, loss

HERE = Path(__file__).parent
Tick = Callable[[], Any]
Rows = dict[str, Tensor]
UNADAPTED = "unadapted"


@dataclass(frozen=True)
class Recipe:
    """How one method is trained."""

    lr: float
    options: Mapping[str, Any] = field(default_factory=dict)


EVERYWHERE = {"target": ["all-linear", "conv"]}
STYLES: dict[str, dict[str, Recipe]] = {
    "UNet": {
        "lora": Recipe(5e-3, {**EVERYWHERE, "rank": 8}),
        "oft": Recipe(5e-3, {**EVERYWHERE, "block_size": 8}),
        "loha": Recipe(5e-3, {**EVERYWHERE, "rank": 8}),
    },
    "DiT": {
        "lora": Recipe(5e-3, {"target": "all-linear", "rank": 8}),
        "oft": Recipe(5e-3, {"target": "all-linear", "block_size": 8}),
        "bitfit": Recipe(5e-3),
    },
}
CONTROLS = {
    "controlnet": Recipe(
        2e-3, {"channels": 1, "widths": [16, 32]}
    ),  # one halving of the image, as from pixels to latents
    "t2i_adapter": Recipe(5e-3, {"channels": 1, "downscale": 2}),
}
BOTH = "controlnet + lora"
CONTROL, READER = 150, 200
"""Steps in which a method learns to follow edges, and a classifier to read."""
QUICK = 8
"""By how much --quick divides the number of steps."""
DRAWN, FEW = 100, 20
"""Digits that are drawn to be scored; few of them with --quick."""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Callable[[Tensor, Tensor, torch.Generator], Tensor],
    data: tuple[Tensor, Tensor],
    steps: int,
    tick: Tick,
) -> None:
    """Some steps on what is not held out; the learning rate rises, stays, and falls to nothing."""
    torch.manual_seed(SEED)  # for dropout: no training depends on what was trained before it
    images, labels = data
    drawn = torch.Generator().manual_seed(SEED)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0, 2 * (1 - step / steps))
    )
    model.train()
    for _ in range(steps):
        chosen = torch.randint(HELD_OUT, len(labels), (BATCH_SIZE,), generator=drawn)
        optimizer.zero_grad()
        objective(images[chosen], labels[chosen], drawn).backward()
        optimizer.step()
        schedule.step()
        tick()
    model.eval()


def pretrained(host: Denoiser, data: tuple[Tensor, Tensor], steps: int, tick: Tick) -> nn.Module:
    torch.manual_seed(SEED)
    model = host.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=host.lr, weight_decay=0.0)
    train(model, optimizer, lambda *batch: loss(model, host, *batch), data, steps, tick)
    return model


def adapted(
    base: nn.Module,
    host: Denoiser,
    method: str,
    recipe: Recipe,
    data: tuple[Tensor, Tensor],
    steps: int,
    tick: Tick,
    steer: bool = False,
) -> tuple[nn.Module, peftcore.Injection]:
    """A copy of the host in which a method has learned to draw such data; with `steer`, to follow its edges."""
    model = copy.deepcopy(base)
    injection = peftcore.apply(model, method, seed=SEED, **recipe.options)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=recipe.lr, weight_decay=0.0, total_steps=steps)

    def objective(images: Tensor, labels: Tensor, drawn: torch.Generator) -> Tensor:
        # The edges reach the method by the side: forward has no argument for them.
        with peftcore.call(model, condition=edges(images)) if steer else nullcontext():
            return loss(model, host, images, labels, drawn)

    train(model, optimizer, objective, data, steps, tick)
    return model, injection


def reader(data: tuple[Tensor, Tensor], classes: int, steps: int, tick: Tick) -> Callable[[Tensor], Tensor]:
    """A classifier of real images, which also knows noisy ones: what is drawn is never quite clean."""
    torch.manual_seed(SEED)
    model = Reader(classes)

    def objective(images: Tensor, labels: Tensor, drawn: torch.Generator) -> Tensor:
        noise = 0.2 * torch.randn(images.shape, generator=drawn)
        return nn.functional.cross_entropy(model(images + noise), labels)

    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), objective, data, steps, tick)

    def read(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images).argmax(-1)

    return read


class Judge:
    """Says of what was drawn whether it has the new style, and whether it is the digit that was asked for."""

    def __init__(self, images: Tensor, labels: Tensor, steps: int, tick: Tick) -> None:
        new = faded_italics(images)
        # The styles alternate, so that the first of the mixture are the held-out ones here too.
        mixed = torch.stack([images, new], 1).flatten(0, 1)
        self._style = reader((mixed, torch.arange(len(mixed)) % 2), 2, steps, tick)
        self._digit = reader((new, labels), 10, steps, tick)
        self.held_out = self(new[:HELD_OUT], labels[:HELD_OUT])

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        style, digit = self._style(images) == 1, self._digit(images) == labels
        shares = {"style": style, "digit": digit, "both": style & digit}
        return {name: share.float().mean().item() for name, share in shares.items()}


def overlap(drawn: Tensor, wanted: Tensor) -> float:
    """Ink that two digits have in common over ink that either has, on the average."""
    one, other = drawn > 0, wanted > 0
    shared = (one & other).flatten(1).sum(1) / (one | other).flatten(1).sum(1).clamp(min=1)
    return shared.mean().item()


def count(injection: peftcore.Injection) -> int:
    return sum(parameter.numel() for parameter in injection.parameters() if parameter.requires_grad)


class Display:
    """One bar over all steps, and what they are for."""

    def __init__(self, total: int) -> None:
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.bar = self.progress.add_task("", total=total)

    def begins(self, what: str) -> Tick:
        self.progress.update(self.bar, description=what)
        return lambda: self.progress.advance(self.bar)


@dataclass
class Outcome:
    """Rows of the two tables, and the pictures as rows of images."""

    styles: list[dict[str, Any]] = field(default_factory=list)
    steering: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Rows] = field(default_factory=dict)


def run(share: int, number: int, display: Display) -> Outcome:
    """Everything, with so many times fewer steps, and so many digits drawn to be scored."""
    plain, labels = digits()
    new = faded_italics(plain)
    outcome = Outcome()
    judge = Judge(plain, labels, READER // share, display.begins("classifiers that score what is drawn"))
    wanted = torch.arange(number) % 10
    outcome.styles.append({"host": "real digits", "method": "", **judge.held_out, "trainable": 0, "seconds": 0.0})
    for name, host in HOSTS.items():
        base = pretrained(host, (plain, labels), host.pretraining // share, display.begins(f"{name} learns to draw"))
        drawn = draw(base, host, wanted)
        scores = {**judge(drawn, wanted), "trainable": 0, "seconds": 0.0}
        outcome.styles.append({"host": name, "method": UNADAPTED, **scores})
        rows = outcome.pictures[name.lower()] = {"real digits": examples(new, labels), UNADAPTED: drawn[:10]}
        with tempfile.TemporaryDirectory() as folder:
            for method, recipe in STYLES[name].items():
                began, tick = time.process_time(), display.begins(f"{name}: {method} learns the style")
                model, injection = adapted(base, host, method, recipe, (new, labels), host.adaptation // share, tick)
                seconds, drawn = time.process_time() - began, draw(model, host, wanted)
                scores = {**judge(drawn, wanted), "trainable": count(injection), "seconds": seconds}
                outcome.styles.append({"host": name, "method": method, **scores})
                rows[method] = drawn[:10]
                injection.save(Path(folder, method))
            if name == "UNet":
                steer(base, host, (plain, labels), number, CONTROL // share, Path(folder), outcome, display)
    return outcome


def examples(images: Tensor, labels: Tensor) -> Tensor:
    """One held-out image of each digit."""
    return torch.stack([images[:HELD_OUT][labels[:HELD_OUT] == digit][0] for digit in range(10)])


def steer(
    base: nn.Module,
    host: Denoiser,
    data: tuple[Tensor, Tensor],
    number: int,
    steps: int,
    saved: Path,
    outcome: Outcome,
    display: Display,
) -> None:
    """Let methods follow the edges of a number of held-out digits, whose label is told as ever."""
    images, labels = data[0][:HELD_OUT], data[1][:HELD_OUT]
    images = torch.cat([examples(images, labels), images])[:number]
    labels = torch.cat([torch.arange(10), labels])[:number]
    rows = outcome.pictures["edges"] = {"edges": 2 * edges(images[:10]) - 1}

    def keep(method: str, drawn: Tensor, wanted: Tensor, trainable: int, seconds: float) -> None:
        numbers = {"overlap": overlap(drawn, wanted), "trainable": trainable, "seconds": seconds}
        outcome.steering.append({"host": "UNet", "method": method, **numbers})
        rows[method] = drawn[:10]

    keep(UNADAPTED, draw(base, host, labels), images, 0, 0.0)
    for method, recipe in CONTROLS.items():
        began, tick = time.process_time(), display.begins(f"UNet: {method} learns to follow edges")
        model, injection = adapted(base, host, method, recipe, data, steps, tick, steer=True)
        seconds = time.process_time() - began
        with peftcore.call(model, condition=edges(images)):
            keep(method, draw(model, host, labels), images, count(injection), seconds)
        if method == "controlnet":  # and the style that lora has learned, loaded beside it
            peftcore.load(model, saved / "lora")
            ink = 2 * faded_italics(images) - 1
            with peftcore.call(model, condition=edges(ink)):
                drawn = draw(model, host, labels)
            keep(BOTH, 2 * drawn - 1, ink, 0, 0.0)
            rows[BOTH] = drawn[:10]


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    printed = Table(title=title, title_justify="left")
    for heading in rows[0]:
        shown = "model" if heading == "host" else heading
        printed.add_column(shown, justify="left" if heading in ("host", "method") else "right")
    formats = {"style": ".2f", "digit": ".2f", "both": ".2f", "overlap": ".2f", "trainable": ",", "seconds": ".0f"}
    formats |= {"likeness": ".2f", "drift": ".2f"}
    for row in rows:
        printed.add_row(*(format(value, formats.get(heading, "")) for heading, value in row.items()))
    return printed


def picture(rows: Rows, path: Path) -> None:
    """A grid of images with a name before each row."""
    figure = Figure(figsize=(8.2, 0.72 * len(rows)), dpi=110, facecolor="0.85")
    figure.subplots_adjust(left=0.16, right=0.99, bottom=0.02, top=0.98, wspace=0.06, hspace=0.06)
    grid = figure.subplots(len(rows), 10)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
            axes.set_axis_off()
        line[0].text(-0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="where the pictures and results.json go")
    parser.add_argument("--quick", action="store_true", help="few steps and drawings: shows that it runs, not how well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # hosts this small gain little from more, and sums keep their order
    share, number = (QUICK, FEW) if arguments.quick else (1, DRAWN)
    total = sum(
        host.pretraining // share + len(STYLES[name]) * (host.adaptation // share) for name, host in HOSTS.items()
    )
    total += len(CONTROLS) * (CONTROL // share) + 2 * (READER // share)
    display = Display(total)
    with display.progress:
        outcome = run(share, number, display)
    seconds = time.process_time()  # of the one core that it uses: other programs do not count
    console = Console()
    console.print(table(f"{number} digits drawn after adaptation to faded italics", outcome.styles))
    console.print(table(f"{number} digits drawn along the edges of digits of the validation set", outcome.steering))
    console.print(f"{seconds:.0f} seconds of one core", highlight=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {"seconds": seconds, "styles": outcome.styles, "steering": outcome.steering}
    (arguments.out / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name, rows in outcome.pictures.items():
        picture(rows, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
