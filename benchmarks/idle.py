"""What a miss costs where adapters are idle, and where they are removed and loaded again.

``python -m benchmarks.idle`` prints both, in alternating turns, on a small Llama with 336 target modules.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import peftcore
from benchmarks.hosts import llama, tokens
from benchmarks.timing import ratio, take_turns

TARGET = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
ROUNDS = 10


def adapted() -> tuple[Any, peftcore.Injection]:
    """Return a model with two frozen adapters, of which "b" is active, and the other one."""
    model = llama(width=64, layers=48)
    one, other = (peftcore.apply(model, "lora", name=name, target=TARGET) for name in "ab")
    for each in (one, other):
        each.trainable(False)
    peftcore.activate(model, "b")
    return model, one


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, _ = adapted()
        pool = peftcore.keep_within(model, "4GB", idle=folder)
        plain, loaded = adapted()
        loaded.save(folder / "saved")
        ids = tokens(1, 1)

        def idle() -> None:
            pool.rest("a")
            pool.wake("a")

        def anew() -> None:
            peftcore.injections(plain)["a"].remove()
            peftcore.load(plain, folder / "saved", name="a", active=False)

        def then_forward(miss: Callable[[], None], host: Any) -> Callable[[], None]:
            def run() -> None:
                miss()
                with torch.no_grad():
                    peftcore.using(host, "a")(host, input_ids=ids, use_cache=False)

            return run

        steps = {"idle": idle, "anew": anew, "idle+": then_forward(idle, model), "anew+": then_forward(anew, plain)}
        times = take_turns(steps, ROUNDS, 2)
    for what, each in times.items():
        print(f"{what}: {1e3 * median(each):.0f} ms")
    print("a miss, loaded over idle:", ratio(times, "anew", "idle"))
    print("with a forward of one token:", ratio(times, "anew+", "idle+"))


if __name__ == "__main__":
    main()
