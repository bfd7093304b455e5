"""LoRA on the experts of a mixture, which are stacked parameters and no layers: steps, and one token at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.contenders import LORA, Step, limit_step, training_step
from benchmarks.hosts import mixture, tokens
from benchmarks.rows import Row
from benchmarks.serving import forward
from benchmarks.steps import LENGTH, beyond, heavier, in_layouts, peaks, ratio_of
from benchmarks.timing import take_turns

OURS = ["re:.*experts.gate_up_proj", "re:.*experts.down_proj"]
THEIRS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PAIR = replace(LORA, theirs={**LORA.theirs, "target_parameters": THEIRS})


def hosts() -> Mapping[str, Any]:
    """Ours, ours with the least memory, and theirs, on copies of one host."""
    base = mixture()
    return {
        "ours": PAIR.ours_on(copy.deepcopy(base), OURS),
        "frugal": replace(PAIR, frugal=True).ours_on(copy.deepcopy(base), OURS),
        "theirs": PAIR.theirs_on(copy.deepcopy(base), []),
    }


def steps() -> Mapping[str, Step]:
    """The limit, and a step of each."""
    ids = tokens(4, LENGTH)
    return {"limit": limit_step(mixture(), ids), **{who: training_step(model, ids) for who, model in hosts().items()}}


def expert_rows(rounds: int) -> Iterator[list[Row]]:
    """Time and memory of a step, and the time of a token."""
    figure = "{}, lora on experts{}: time beyond the {}"
    times = in_layouts(steps, rounds, ratio_of)
    memory = peaks(steps())
    rows = []
    for kind, who in (("", "ours"), (", frugal", "frugal")):
        of_kind = {**times, "ours": times[who]}
        rows.append(beyond(figure.format("step", kind, "limit"), of_kind, math.inf if kind else 1.0))
        rows.append(heavier(f"step, lora on experts{kind}", {**memory, "ours": memory[who]}))
    ids = torch.zeros(1, 1, dtype=torch.long)
    calls = {"limit": forward(mixture(), ids), **{who: forward(model, ids) for who, model in hosts().items()}}
    rows.append(beyond(figure.format("one token", "", "base"), take_turns(calls, 5 * rounds, warmup=10), 1.0))
    yield rows
