"""The five figures that a user cares about, in the environment that a user has: torch's own number of threads, and the
system's own memory. ``python -m benchmarks.everyday`` puts them at the top of docs/performance.md."""

from __future__ import annotations

import copy
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console

from benchmarks import lifecycle, page
from benchmarks.__main__ import table
from benchmarks.contenders import PAIRS, Step, training_step
from benchmarks.hosts import llama, tokens
from benchmarks.rows import Row
from benchmarks.serving import LAYERS, decoding
from benchmarks.steps import LENGTH, heavier, peaks
from benchmarks.timing import take_turns

ROUNDS = 24


def both(method: str, base: Any, make: Callable[[Any, torch.Tensor], Step], ids: torch.Tensor) -> Mapping[str, Step]:
    """Return what ours and theirs do on copies of one model."""
    pair = PAIRS[method]
    return {
        "ours": make(pair.ours_on(copy.deepcopy(base)), ids),
        "theirs": make(pair.theirs_on(copy.deepcopy(base)), ids),
    }


def everyday() -> Iterator[Row]:
    """Measure each figure: whole times, not what is added to a limit."""
    [importing] = next(lifecycle.importing(ROUNDS))
    yield importing
    injecting, *_ = next(lifecycle.injecting(ROUNDS // 2))
    yield injecting
    base, ids = llama(), tokens(4, LENGTH)
    step = take_turns(both("lora", base, training_step, ids), ROUNDS)
    yield lifecycle.compared("a training step with LoRA", step, 1.0)
    yield heavier("a training step with DoRA", peaks(both("dora", base, training_step, ids)))
    token = take_turns(both("lora", llama(layers=LAYERS), decoding, tokens(1, 1)), 10 * ROUNDS)
    yield lifecycle.compared("a token with LoRA", token, 1.0)


def main() -> None:
    """Measure, print, write."""
    warnings.simplefilter("ignore")
    rows = list(everyday())
    Console().print(table(rows))
    circumstances = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        **{name: version(name) for name in ("torch", "transformers", "peft", "peftcore")},
    }
    page.write("python -m benchmarks.everyday", page.figures(rows, circumstances))


if __name__ == "__main__":
    main()
