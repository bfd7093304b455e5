"""Benchmarks without gradients: one token at a time, and a different adapter for each row."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextvars import copy_context
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import peftcore
from benchmarks.contenders import LORA, PAIRS, Step
from benchmarks.hosts import llama, tokens
from benchmarks.rows import Row
from benchmarks.steps import beyond, in_layouts, over, ratio_of
from benchmarks.timing import Estimate, Times, overhead, take_turns

LAYERS = 8
WEIGHT_FORM = ("dora", "oft", "boft", "hra", "loha", "lokr", "fourierft")
"""Methods that change the weight: after the first token they are to cost what LoRA costs."""
BESIDE = ("dora", "oft", "boft", "hra")
"""Some of these methods, timed in the activation form, too, where no effective weight is kept."""
MIXED = ("dora", "oft", "hra")
"""Some of these methods, timed on rows of several adapters."""


def forward(model: nn.Module, ids: torch.Tensor, **more: Any) -> Step:
    """Make one forward without gradients."""
    model.eval()

    def call() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, **more)

    return call


def decoding(model: nn.Module, ids: torch.Tensor) -> Step:
    """Make one forward of many between which nothing writes to weights, as `generate` does."""
    promise, context = peftcore.cache_weights(model), copy_context()
    context.run(promise.__enter__)
    call = forward(model, ids)

    def step(held: object = promise) -> None:  # the promise ends with the step
        context.run(call)

    return step


def one_token(rounds: int) -> Iterator[list[Row]]:
    """Measure the time that an adapter adds to a forward of one token."""
    base, ids = llama(layers=LAYERS), tokens(1, 1)
    others = {name: PAIRS[name] for name in WEIGHT_FORM}
    others |= {f"{name}, low memory": replace(PAIRS[name], low_memory=True) for name in BESIDE}

    def build() -> Mapping[str, Step]:
        pairs = {"ours": LORA, **others}
        return {
            "limit": decoding(copy.deepcopy(base), ids),
            "theirs": decoding(LORA.theirs_on(copy.deepcopy(base)), ids),
            **{name: decoding(pair.ours_on(copy.deepcopy(base)), ids) for name, pair in pairs.items()},
        }

    times = in_layouts(build, 10 * rounds, (ratio_of, 0.6))
    rows = [beyond("one token, lora: time beyond the base", times, 0.6)]
    for name in others:
        figure, ratio = f"one token, {name}: time beyond the base, over lora's", overhead(times, name, "ours", "limit")
        rows.append(Row(figure, over(times, name), "(ours)", ratio, 1.2 if name in WEIGHT_FORM else math.inf))
    yield rows


def many(adapters: int) -> Mapping[str, Step]:
    """Return the base, ours and theirs with that many LoRAs, each on a row of its own."""
    base, ids, names = llama(layers=LAYERS), tokens(adapters, 32), [f"a{number}" for number in range(adapters)]
    theirs: Any = LORA.theirs_on(copy.deepcopy(base), name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, LORA.settings())
    return {
        "limit": forward(copy.deepcopy(base), ids),
        "ours": on_rows("lora", adapters),
        "theirs": forward(theirs, ids, adapter_names=names),
    }


def on_rows(method: str, adapters: int, rows: int = 8) -> Step:
    """Return ours with that many adapters of one method, of which as many as there are rows act, each on one."""
    model = llama(layers=LAYERS)
    for number in range(adapters):
        PAIRS[method].ours_on(model, name=f"a{number}")
    peftcore.route(model, [f"a{number}" for number in range(rows)])
    return forward(model, tokens(rows, 32))


def mixed_rows(rounds: int) -> Iterator[list[Row]]:
    """Measure eight rows on eight adapters, of 8 and of 64 that are there; and of methods that act on weights, which
    peft does not mix in a batch."""
    figure = "8 rows on 8 adapters{}: time beyond the base"

    def of_64(times: Times) -> Estimate:
        return overhead(times, "ours, of 64", "ours", "limit")

    times = in_layouts(
        lambda: {**many(8), "ours, of 64": on_rows("lora", 64)}, 3 * rounds, (ratio_of, 0.5), (of_64, 1.05)
    )
    yield [
        beyond(figure.format(""), times, 0.5),
        Row(figure.format(" of 64, over that of 8"), over(times, "ours, of 64"), "(ours)", of_64(times), 1.05),
    ]
    times = take_turns({**many(8), **{name: on_rows(name, 8) for name in MIXED}}, rounds)
    yield [
        Row(
            f"8 rows on 8 adapters, {name}: time beyond the base, over lora's",
            over(times, name),
            "(ours)",
            overhead(times, name, "ours", "limit"),
            math.inf,
        )
        for name in MIXED
    ]
