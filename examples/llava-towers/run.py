"""A LLaVA that names digits, and adapters in one of its two towers alone, chosen by what the tower takes in.

python examples/llava-towers/run.py prints a table and writes results.json beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import peftcore

HERE = Path(__file__).parent
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("<image>", "this", "is", *NAMES)
PATCHES = 16
TOWERS = {"vision": "model.vision_tower", "text": "model.language_model"}
"""What goes in, and where this class keeps the tower: adapters are put in by the former, the latter is for counting."""
PROBES = {
    "model.vision_tower": {"pixel_values": torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)},
    "model.language_model": {"inputs_embeds": torch.linspace(-1, 1, 6 * 48).view(1, 6, 48)},
}
"""Inputs for each tower alone."""
STEPS, PRETRAINING, BATCH_SIZE = 120, 300, 64
QUICK = 4
"""By how much --quick divides the number of steps."""
Digits = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    target: str
    upright: float
    lying: float
    trainable: int
    operators: dict[str, int]
    """How many stand in each tower."""
    other_unchanged: bool
    """Whether the tower without operators has the weights that it had and says what it said, to the bit."""


def llava() -> transformers.LlavaForConditionalGeneration:
    """Pictures of 8 x 8 pixels in 16 patches, and a language of 13 words."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=2
    )
    text = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=WORDS.index("<image>"), vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def digits() -> tuple[Digits, Digits]:
    """1,200 to train on and 597 to score: pictures [n, 3, 8, 8] in -1 .. 1, and the tokens of their names."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(found.images, dtype=torch.float32)[order, None].expand(-1, 3, -1, -1) / 8 - 1
    names = torch.tensor(found.target)[order] + WORDS.index("zero")
    return (pictures[:1200], names[:1200]), (pictures[1200:], names[1200:])


def lying(data: Digits) -> Digits:
    """The same digits on their left side."""
    return torch.rot90(data[0], 1, (-2, -1)), data[1]


def named(model: nn.Module, pictures: Tensor) -> Tensor:
    """Scores of the word behind ``<image> this is`` [n, words]."""
    prompt = [WORDS.index(word) for word in (*["<image>"] * PATCHES, "this", "is")]
    ids = torch.tensor(prompt).expand(len(pictures), -1)
    scores: Tensor = model(input_ids=ids, pixel_values=pictures, logits_to_keep=1).logits[:, -1]
    return scores


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, steps: int) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    drawn = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(data[1]), (BATCH_SIZE,), generator=drawn)
        optimizer.zero_grad()
        nn.functional.cross_entropy(named(model, data[0][chosen]), data[1][chosen]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    return (named(model, data[0]).argmax(-1) == data[1]).float().mean().item()


@torch.no_grad()
def unchanged(path: str, model: nn.Module, base: nn.Module) -> bool:
    """Whether a tower has the weights that it had and says what it said, to the bit."""
    towers = model.get_submodule(path), base.get_submodule(path)
    now, before = (dict(tower.named_parameters()) for tower in towers)
    same = now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
    said, earlier = (tower(**PROBES[path]).last_hidden_state for tower in towers)
    return same and torch.equal(said, earlier)


def adapted(base: nn.Module, sense: str, steps: int) -> Result:
    """LoRA in one tower, trained on digits that lie on their side."""
    train, test = digits()
    model = copy.deepcopy(base)
    target = f"{sense}:all-linear"
    injection = peftcore.apply(model, "lora", rank=8, target=target, seed=0)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.0, total_steps=steps)
    learn(model, optimizer, lying(train), steps)
    [other] = [path for name, path in TOWERS.items() if name != sense]
    return Result(
        target=target,
        upright=accuracy(model, test),
        lying=accuracy(model, lying(test)),
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        operators={
            name: sum(site.startswith(f"{path}.") for site in injection.operators) for name, path in TOWERS.items()
        },
        other_unchanged=unchanged(other, model, base),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json goes")
    parser.add_argument("--quick", action="store_true", help="a quarter of the steps: shows that it runs, not how well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a host this small gains nothing from more, and sums keep their order
    divisor = QUICK if arguments.quick else 1
    train, test = digits()
    torch.manual_seed(0)
    base = llava()
    learn(base, torch.optim.AdamW(base.parameters(), lr=2e-3, weight_decay=0.0), train, PRETRAINING // divisor)
    bare = Result("none", accuracy(base, test), accuracy(base, lying(test)), 0, dict.fromkeys(TOWERS, 0), True)
    results = [bare, *(adapted(base, sense, STEPS // divisor) for sense in TOWERS)]
    seconds = time.process_time()
    Console().print(table(results), f"{seconds:.0f} seconds of one core", highlight=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {"seconds": seconds, "results": [asdict(result) for result in results]}
    (arguments.out / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def table(results: list[Result]) -> Table:
    printed = Table(title="Digits that lie on their side, and where the operators are", title_justify="left")
    for heading in ("target", "upright", "lying", "trainable", *(f"in {name}" for name in TOWERS)):
        printed.add_column(heading, justify="left" if heading == "target" else "right")
    printed.add_column("other tower")
    for each in results:
        other = "as it was" if each.other_unchanged else "CHANGED"
        numbers = f"{each.upright:.3f}", f"{each.lying:.3f}", f"{each.trainable:,}"
        printed.add_row(each.target, *numbers, *map(str, each.operators.values()), other if each.trainable else "")
    return printed


if __name__ == "__main__":
    main()
