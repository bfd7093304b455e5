"""LoRA on attention and experts of mixtures, of which experts are stacked parameters and no layers: steps, and a token
by itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.contenders import LORA, Step, limit_step, training_step
from benchmarks.hosts import PROJECTIONS, mixture, tokens
from benchmarks.rows import Row
from benchmarks.serving import decoding
from benchmarks.steps import LENGTH, beyond, heavier, in_layouts, peaks, ratio_of
from benchmarks.timing import take_turns

ATTENTION = PROJECTIONS[:4]
OURS = [*ATTENTION, "re:.*experts.gate_up_proj", "re:.*experts.down_proj"]
THEIRS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PAIR = replace(LORA, theirs={**LORA.theirs, "target_parameters": THEIRS})
SIZES = ((16, 256), (64, 512))
"""How many experts, and how wide."""


def hosts(experts: int, width: int) -> Mapping[str, Any]:
    """Return the host as it is, with ours, and with theirs."""
    base = mixture(width, experts=experts)
    ours, theirs = PAIR.ours_on(copy.deepcopy(base), OURS), PAIR.theirs_on(copy.deepcopy(base), ATTENTION)
    return {"limit": base, "ours": ours, "theirs": theirs}


def steps(experts: int, width: int) -> Mapping[str, Step]:
    """Return steps of the limit, ours and theirs."""
    ids, made = tokens(4, LENGTH), hosts(experts, width)
    return {
        "limit": limit_step(made["limit"], ids),
        **{who: training_step(made[who], ids) for who in ("ours", "theirs")},
    }


def expert_rows(rounds: int) -> Iterator[list[Row]]:
    """Measure time and memory of a step, and the time of a token."""
    for size in SIZES:
        where = "lora on attention and {} experts of width {}".format(*size)
        times = in_layouts(lambda size=size: steps(*size), rounds, (ratio_of, 1.0))  # type: ignore[misc]
        step = beyond(f"step, {where}: time beyond the limit", times, 1.0)
        ids = torch.zeros(1, 1, dtype=torch.long)
        calls = {who: decoding(model, ids) for who, model in hosts(*size).items()}
        token = beyond(f"one token, {where}: time beyond the base", take_turns(calls, 5 * rounds, warmup=10), 1.0)
        yield [step, heavier(f"step, {where}", peaks(steps(*size))), token]
