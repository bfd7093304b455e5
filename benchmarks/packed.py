"""Benchmarks on a model quantized in 4 bits by bitsandbytes: training steps, and one token at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import peftcore
from benchmarks.contenders import PAIRS
from benchmarks.hosts import llama, tokens
from benchmarks.rows import Row
from benchmarks.serving import decoding
from benchmarks.steps import LENGTH, beyond, contenders, in_layouts, ratio_of, weighed
from benchmarks.timing import take_turns

METHODS = ("lora", "dora", "oft")
"""Methods that peft has on such a model, too."""
WHERE = " on nf4"


def host(layers: int = 4) -> Any:
    """Build the decoder with its linear layers quantized; peft is told so by an attribute."""
    model = llama(layers=layers)
    peftcore.quantize(model, "bnb-nf4")
    model.is_loaded_in_4bit = True
    return model


def packed_rows(rounds: int) -> Iterator[list[Row]]:
    """Measure time and memory of a step, and the time of a token, beyond those of the quantized host."""
    for name in METHODS:
        times = in_layouts(functools.partial(contenders, name, False, LENGTH, host), rounds, (ratio_of, 1.0))
        step = beyond(f"step{WHERE}, {name}: time beyond the limit", times, 1.0)
        base, ids = host(), tokens(1, 1)
        calls = {
            "limit": decoding(copy.deepcopy(base), ids),
            "ours": decoding(PAIRS[name].ours_on(copy.deepcopy(base)), ids),
            "theirs": decoding(PAIRS[name].theirs_on(copy.deepcopy(base)), ids),
        }
        token = beyond(f"one token{WHERE}, {name}: time beyond the base", take_turns(calls, 5 * rounds, warmup=10), 1.0)
        yield [step, weighed(name, host, WHERE), token]
