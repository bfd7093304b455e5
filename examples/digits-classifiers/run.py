"""Digits that lie on their side, read by hosts that know them upright: ten methods each in a ViT and in a ConvNet.

python examples/digits-classifiers/run.py writes accuracy.png and results.json beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import peftcore
from hosts import HOSTS, SEED, Digits, digits

HERE = Path(__file__).parent
Tick = Callable[[], Any]
UNADAPTED, FULL = "unadapted", "full fine-tuning"


@dataclass(frozen=True)
class Recipe:
    """How one method is trained: learning rates were chosen on 200 digits that are in no table."""

    lr: float
    options: dict[str, Any] = field(default_factory=dict)


MATRICES = {"target": "all-linear"}
CONVOLUTIONS = {"target": ["patch", "conv"]}
RECIPES: dict[str, dict[str, Recipe]] = {
    "ViT": {
        "lora": Recipe(1e-2, MATRICES),
        "dora": Recipe(1e-2, MATRICES),
        "oft": Recipe(3e-2, {**MATRICES, "block_size": 8}),
        "vera": Recipe(1e-1, {**MATRICES, "rank": 64}),
        "ia3": Recipe(1e-1),
        "bitfit": Recipe(3e-2),
        "ln_tuning": Recipe(1e-1),
        "adaptformer": Recipe(1e-1, {"bottleneck": 8}),
        "convpass": Recipe(1e-2),
        "vpt_deep": Recipe(1e-1),
        FULL: Recipe(6e-3),
    },
    "ConvNet": {
        "lora": Recipe(3e-2, {**CONVOLUTIONS, "rank": 4}),
        "loha": Recipe(1e-2, {**CONVOLUTIONS, "rank": 4}),
        "lokr": Recipe(3e-2, CONVOLUTIONS),
        "boft": Recipe(3e-2, {"target": "conv", "block_size": 4}),
        "hra": Recipe(3e-2, CONVOLUTIONS),
        "fourierft": Recipe(3e-2, {**CONVOLUTIONS, "n_frequency": 200}),
        "shira": Recipe(3e-2, {**CONVOLUTIONS, "rank": 2}),
        "svdiff": Recipe(1e-1),
        "glora": Recipe(3e-2, CONVOLUTIONS),
        "bitfit": Recipe(3e-2),
        FULL: Recipe(1e-2),
    },
}
STEPS, PRETRAINING = 120, {"ViT": 300, "ConvNet": 120}
QUICK = 10
"""By how much --quick divides the number of steps."""


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    host: str
    method: str
    accuracy: float
    trainable: int
    seconds: float
    """Of the processor, so that other programs do not count."""


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, steps: int, tick: Tick) -> None:
    """Some steps, at a learning rate that falls to nothing."""
    torch.manual_seed(SEED)  # for dropout: no training depends on what was trained before it
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    model.train()
    for images, labels in data.batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
        tick()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    return (model(data.images).argmax(-1) == data.labels).float().mean().item()


def pretrained(host: str, data: Digits, steps: int, tick: Tick) -> nn.Module:
    torch.manual_seed(SEED)
    model = HOSTS[host]()
    learn(model, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), data, steps, tick)
    return model


def adapt(
    host: str, base: nn.Module, method: str, recipe: Recipe, data: Digits, steps: int, tick: Tick
) -> tuple[nn.Module, int]:
    """The host with a trained method in it, and how many parameters that trained."""
    model = copy.deepcopy(base)
    if method == FULL:
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0)
    else:
        injection = peftcore.apply(model, method, seed=SEED, **recipe.options)
        # An optimizer of the injection knows what a method wants of it: groups, schedules, rules for gradients.
        optimizer = injection.optimizer(torch.optim.AdamW, lr=recipe.lr, weight_decay=0.0, total_steps=steps)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    learn(model, optimizer, data, steps, tick)
    return model, trainable


def compare(host: str, steps: int, pretraining: int, progress: Progress) -> list[Result]:
    """The unadapted host, each method, and full fine-tuning."""
    train, _, test = digits()
    lying = train.turned(), test.turned()
    recipes = RECIPES[host]
    bar = progress.add_task(host, total=pretraining + steps * len(recipes), doing="learns upright digits")
    base = pretrained(host, train, pretraining, lambda: progress.advance(bar))
    progress.console.print(f"{host}: {accuracy(base, test):.3f} on upright digits", highlight=False)
    results = [Result(host, UNADAPTED, accuracy(base, lying[1]), 0, 0.0)]
    for method, recipe in recipes.items():
        progress.update(bar, doing=method)
        began = time.process_time()
        model, trainable = adapt(host, base, method, recipe, lying[0], steps, lambda: progress.advance(bar))
        seconds = time.process_time() - began
        results.append(Result(host, method, accuracy(model, lying[1]), trainable, seconds))
    progress.update(bar, doing="done")
    return results


def table(results: list[Result]) -> Table:
    printed = Table(title="Digits that lie on their side", title_justify="left")
    for heading in ("model", "method", "accuracy", "trainable", "seconds"):
        printed.add_column(heading, justify="left" if heading in ("model", "method") else "right")
    for result in results:
        numbers = f"{result.accuracy:.3f}", f"{result.trainable:,}", f"{result.seconds:.1f}"
        printed.add_row(result.host, result.method, *numbers, end_section=result.method == FULL)
    return printed


def picture(results: list[Result], path: Path) -> None:
    """Accuracy over trainable parameters, one panel a host; names stand beside their points."""
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    for axes, host in zip(figure.subplots(1, len(HOSTS), sharey=True), HOSTS, strict=True):
        rows = [result for result in results if result.host == host and result.method != UNADAPTED]
        [bare] = [result for result in results if result.host == host and result.method == UNADAPTED]
        axes.axhline(bare.accuracy, color="0.45", linestyle="--", linewidth=1)
        axes.annotate("unadapted", (0.99, bare.accuracy), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        for row in rows:
            axes.plot(row.trainable, row.accuracy, "o", color="#b3541e" if row.method == FULL else "#1f5fa8")
        axes.set(xscale="log", title=host, xlabel="trainable parameters (log scale)")
        axes.set_xlim(min(row.trainable for row in rows) / 2, max(row.trainable for row in rows) * 3)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        figure.draw_without_rendering()  # settles the layout, without which no text has an extent
        label(axes, rows)
    figure.axes[0].set_ylabel("accuracy on 597 validation digits")
    figure.savefig(path)


def label(axes: Any, rows: list[Result]) -> None:
    """Put each name as close to its point as it covers nothing."""
    points = axes.transData.transform([(row.trainable, row.accuracy) for row in rows])
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for row in rows:
        for turn in range(48):  # eight directions, then the same farther away
            angle, far = turn % 8 * math.pi / 4, 7 + 6 * (turn // 8)
            x, y = far * math.cos(angle), far * math.sin(angle)
            text = axes.annotate(
                row.method,
                (row.trainable, row.accuracy),
                xytext=(x, y),
                textcoords="offset points",
                ha="left" if x > 1 else "right" if x < -1 else "center",
                va="bottom" if y > 1 else "top" if y < -1 else "center",
                fontsize=9,
                in_layout=False,
            )
            extent = text.get_window_extent()
            if not any(extent.overlaps(other) for other in taken) and axes.bbox.containsx(extent.x1):
                break
            if turn < 47:
                text.remove()
        taken.append(extent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="where accuracy.png and results.json go")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps: shows that it runs, not how well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # hosts this small gain nothing from more, and sums keep their order
    results: list[Result] = []
    columns = TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[doing]}"), console=Console(stderr=True)) as progress:
        for host in HOSTS:
            steps = STEPS // QUICK if arguments.quick else STEPS
            results += compare(host, steps, PRETRAINING[host], progress)
    seconds = time.process_time()  # of the one core that it uses: other programs do not count
    Console().print(table(results), f"{seconds:.0f} seconds of one core", highlight=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {"seconds": seconds, "results": [asdict(result) for result in results]}
    (arguments.out / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    picture(results, arguments.out / "accuracy.png")


if __name__ == "__main__":
    main()
