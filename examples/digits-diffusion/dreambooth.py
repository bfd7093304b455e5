"""DreamBooth (arXiv 2208.12242) as a recipe: a denoiser learns one subject from five images, and what it knew stays.

    loss = loss(images of the subject, its words) + weight * loss(images of the class, the class's words)

The images of the class are drawn by the model itself before it is adapted: the prior that is preserved. Any method of
the registry may learn; here it is LoRA. python examples/digits-diffusion/dreambooth.py writes dreambooth.png and
dreambooth.json beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import peftcore
from hosts import HOSTS, SEED, WIDTH, WORDS, Denoiser, digits, draw, loss
from run import HERE, QUICK, Display, overlap, picture, pretrained, table

CLASS, SUBJECT = 7, 10
"""The digit that the subject is one of, and the number under which its own words stand."""
STEPS, LR, BATCH_SIZE = 200, 5e-3, 16
WEIGHT = 1.0
"""Of the prior."""


def with_subject(host: Denoiser) -> Denoiser:
    """The host with words for the subject: those of its class behind a word that nobody has used."""
    rare = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(SEED + 1))
    words = torch.cat([WORDS, torch.cat([rare, WORDS[CLASS, 1:]])[None]])  # [11, 4, width]
    return replace(host, told=lambda labels: {"encoder_hidden_states": words[labels]})


def subject() -> Tensor:
    """Five images of one 7 between two bars, each a pixel elsewhere."""
    images, labels = digits()
    one = images[labels == CLASS][0].clone()
    one[:, [0, 1, 14, 15]] = 1.0
    return torch.stack([one.roll(shift, (-2, -1)) for shift in ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1))])


def personalized(
    base: nn.Module, host: Denoiser, images: Tensor, prior: Tensor, weight: float, steps: int, tick: Callable[[], Any]
) -> tuple[nn.Module, peftcore.Injection]:
    """A copy of the host that knows the subject."""
    model = copy.deepcopy(base)
    injection = peftcore.apply(model, "lora", target=["all-linear", "conv"], rank=8, seed=SEED)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=LR, weight_decay=0.0)
    drawn = torch.Generator().manual_seed(SEED)

    def of(some: Tensor, label: int) -> Tensor:
        chosen = torch.randint(len(some), (BATCH_SIZE,), generator=drawn)
        return loss(model, host, some[chosen], torch.full((BATCH_SIZE,), label), drawn)

    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        learned = of(images, SUBJECT)
        if weight:
            learned = learned + weight * of(prior, CLASS)
        learned.backward()
        optimizer.step()
        tick()
    return model.eval(), injection


def drift(model: nn.Module, host: Denoiser, before: Tensor, label: int) -> float:
    """How far drawings of the class have moved from those of the unadapted model, from the same noise."""
    return (draw(model, host, torch.full((len(before),), label)) - before).abs().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="where dreambooth.png and dreambooth.json go")
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs, not how well")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    share = QUICK if given.quick else 1
    host = with_subject(HOSTS["UNet"])
    display = Display(host.pretraining // share + 2 * (STEPS // share))
    images, rows, results = subject(), {}, []
    with display.progress:
        base = pretrained(host, digits(), host.pretraining // share, display.begins("the UNet learns to draw"))
        prior = draw(base, host, torch.full((40,), CLASS))
        rows["subject"] = images.repeat(2, 1, 1, 1)
        rows["a 7, before"] = prior[:10]
        for weight, name in ((0.0, "no prior"), (WEIGHT, "prior")):
            began = time.process_time()
            tick = display.begins(f"a subject, {name}")
            model, _ = personalized(base, host, images, prior, weight, STEPS // share, tick)
            seconds = time.process_time() - began
            own = draw(model, host, torch.full((10,), SUBJECT))
            likeness = max(overlap(own, each.expand_as(own)) for each in images)
            results.append(
                {"method": name, "likeness": likeness, "drift": drift(model, host, prior, CLASS), "seconds": seconds}
            )
            rows[f"subject, {name}"] = own
            rows[f"a 7, {name}"] = draw(model, host, torch.full((10,), CLASS))
    Console().print(table("one 7 between bars, from five images", results))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "dreambooth.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    picture(rows, given.out / "dreambooth.png")


if __name__ == "__main__":
    main()
