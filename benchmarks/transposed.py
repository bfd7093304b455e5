"""Benchmarks on GPT-2, whose layers store their weights by inputs: training steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from benchmarks.hosts import VOCABULARY
from benchmarks.rows import Row
from benchmarks.steps import WANTED, beyond, contenders, in_layouts, ratio_of, weighed

METHODS = ("lora", "dora", "vera")
"""Methods that peft has on such layers, too."""
WHERE = " on GPT-2"
TARGET = ["c_attn", "c_proj", "c_fc"]


def host(width: int = 512, layers: int = 4) -> Any:
    """Build a decoder of GPT-2's shape with random weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=8, vocab_size=VOCABULARY)
    made: Any = transformers.GPT2LMHeadModel(config)
    return made.eval()


def transposed_rows(rounds: int) -> Iterator[list[Row]]:
    """Measure time and memory of a step."""
    for name in METHODS:
        build, wanted = functools.partial(contenders, name, host=host, target=TARGET), WANTED.get(name, 1.0)
        step = beyond(
            f"step{WHERE}, {name}: time beyond the limit", in_layouts(build, rounds, (ratio_of, wanted)), wanted
        )
        yield [step, weighed(name, host, WHERE, TARGET)]
