"""``python -m benchmarks.many``: what a step with many adapters costs, for every method whose rows can be routed.

Counts of torch's own counters, exact and the same on every machine: FLOPs of a step with N adapters of one row each, in
those of N steps of one adapter with that row; dispatched operations, in those of a step of one adapter with N rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from benchmarks import page
from peftcore.errors import PeftcoreError
from peftcore.testing.tools import Counts

TOKENS, VOCABULARY = 16, 64
SOME = ("lora", "pissa", "vera", "ia3", "houlsby_adapter", "bitfit", "dora", "oft", "prefix_tuning", "galore")
"""The methods that are measured with more adapters, too."""


def host() -> nn.Module:
    """Make the small Llama of all counts."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    options: dict[str, Any] = {**shape, "vocab_size": VOCABULARY, "attn_implementation": "eager"}
    return LlamaForCausalLM(LlamaConfig(**options))


def cost(model: nn.Module, ids: Tensor, training: bool) -> tuple[int, int]:
    """Return FLOPs and operations of a step."""

    def step() -> None:
        with torch.set_grad_enabled(training):
            loss = model(ids, labels=ids).loss
        if training:
            loss.backward()

    model.train(training)
    step()  # what is planned once is no part of it
    model.zero_grad()
    with Counts() as counts:
        step()
    model.zero_grad()
    return counts.flops, counts.operations


def ratios(method: str, adapters: int, training: bool) -> tuple[float, float] | None:
    """Return FLOPs and operations of a step with so many adapters, as ratios; None where nothing trains.

    Raises:
        PeftcoreError: the method does not act on a Llama by its name alone.
    """
    info = peftcore.method(method).tags
    batch = torch.randint(0, VOCABULARY, (2, TOKENS))
    options: dict[str, Any] = {"data": [{"input_ids": batch, "labels": batch}]} if info.needs_data else {}
    ids = torch.randint(0, VOCABULARY, (adapters, TOKENS))
    model = host()
    injection = peftcore.apply(model, method, **options)
    if training and not any(parameter.requires_grad for parameter in injection.parameters()):
        return None
    (alone, _), (_, one) = cost(model, ids[:1], training), cost(model, ids, training)
    model = host()
    names = [f"adapter{n}" for n in range(adapters)]
    for name in names:
        peftcore.apply(model, method, name=name, **options)
    with peftcore.route(model, names):
        flops, operations = cost(model, ids, training)
    return flops / (adapters * alone), operations / one


def rows(methods: Iterable[str], adapters: int) -> tuple[list[list[str]], list[str]]:
    """Return a row of each method, and the methods that are for other models."""
    found, others = [], []
    for method in track([*methods], f"{adapters} adapters"):
        try:
            each = [ratios(method, adapters, training) for training in (True, False)]
        except PeftcoreError:
            others.append(method)
            continue
        found.append([method, str(adapters), *(text for pair in each for text in _texts(pair))])
    return found, others


def _texts(pair: tuple[float, float] | None) -> list[str]:
    return ["–", "–"] if pair is None else [f"{value:.2f}" for value in pair]


def markdown(found: Iterable[list[str]]) -> str:
    """Return the rows as a table of Markdown."""
    lines = [
        "| method | adapters | FLOPs, training | operations, training | FLOPs, evaluation | operations, evaluation |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in found)])


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many", description=__doc__)
    parser.add_argument("methods", nargs="*", help="all whose rows can be routed when left out")
    parser.add_argument("--page", action="store_true", help="put the table into docs/performance.md")
    given = parser.parse_args()
    methods = given.methods or [info.name for info in peftcore.methods() if info.per_row]
    found, others = rows(methods, 8)
    for adapters in (32, 256):
        found += rows([method for method in SOME if method in methods], adapters)[0]
    table = Table("method", "adapters", "FLOPs, training", "operations", "FLOPs, evaluation", "operations", box=None)
    for row in found:
        table.add_row(*row)
    console = Console()
    console.print(table)
    if others:
        console.print(f"for other models, or with options of their own: {', '.join(others)}")
    if given.page:
        page.write("python -m benchmarks.many --page", markdown(found))


if __name__ == "__main__":
    main()
