"""Benchmarks around training: applying, merging, files, switching, importing."""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft

import peftcore
from benchmarks.contenders import LORA
from benchmarks.hosts import PROJECTIONS, llama
from benchmarks.rows import Row
from benchmarks.timing import Times, ratio, take_turns, uncollected

TARGETS = "336 target modules"
IMPORT = """
import time, torch
start = time.process_time()
import {module}
print(time.process_time() - start)
"""


def shown(times: Times, name: str) -> str:
    return f"{1e3 * np.median(times[name]):.3g} ms"


def compared(figure: str, times: Times, wanted: float, ours: str = "ours", theirs: str = "theirs") -> Row:
    """Return a row of two times, and their ratio."""
    return Row(figure, shown(times, ours), shown(times, theirs), ratio(times, ours, theirs), wanted)


def thrice(calls: dict[str, Callable[[], Callable[[], object]]], rounds: int) -> Times:
    """Time calls that need something new each time: each is prepared first, which does not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1 + rounds):
        for name, prepare in calls.items():
            call = prepare()
            with uncollected():
                begin = time.perf_counter()
                call()
                spent = time.perf_counter() - begin
            if number:
                found[name].append(spent)
            del call
    return {name: np.array(each) for name, each in found.items()}


def injecting(rounds: int) -> Iterator[list[Row]]:
    """Measure applying LoRA to 48 blocks; and the twenty-first beside the second."""
    base = llama(width=64, layers=48)

    def first_of_ours() -> Callable[[], object]:
        model = copy.deepcopy(base)
        return lambda: peftcore.apply(model, "lora", target=PROJECTIONS)

    def first_of_theirs() -> Callable[[], object]:
        model = copy.deepcopy(base)
        return lambda: peft.get_peft_model(model, LORA.settings())

    def another_of_ours(count: int) -> Callable[[], Callable[[], object]]:
        model, name = copy.deepcopy(base), f"a{count}"
        for number in range(count):
            peftcore.apply(model, "lora", target=PROJECTIONS, name=f"a{number}")

        def prepare() -> Callable[[], object]:
            if name in (have := peftcore.injections(model)):
                have[name].remove()
            peftcore.activate(model, "a0")  # as with peft, a new adapter stands beside one that is active
            return lambda: peftcore.apply(model, "lora", target=PROJECTIONS, name=name)

        return prepare

    def another_of_theirs(count: int) -> Callable[[], Callable[[], object]]:
        model, name = LORA.theirs_on(copy.deepcopy(base), name="a0"), f"a{count}"
        for number in range(1, count):
            model.add_adapter(f"a{number}", LORA.settings())

        def prepare() -> Callable[[], object]:
            if name in model.peft_config:
                model.delete_adapter(name)
            return lambda: model.add_adapter(name, LORA.settings())

        return prepare

    times = thrice({"ours": first_of_ours, "theirs": first_of_theirs}, rounds)
    more = {f"ours {count}": another_of_ours(count) for count in (1, 20)}
    more |= {f"theirs {count}": another_of_theirs(count) for count in (1, 20)}
    later = thrice(more, 8)
    yield [
        compared(f"injection of LoRA into {TARGETS}", times, 0.2),
        compared("the 21st adapter", later, 0.1, "ours 20", "theirs 20"),
        compared("the 21st adapter over the 2nd", later, 1.1, "ours 20", "ours 1"),
    ]


def around(rounds: int) -> Iterator[list[Row]]:
    """Measure merge and unmerge, save, load, switch: LoRA on a host of width 512."""
    base = llama(layers=8)
    ours, theirs = copy.deepcopy(base), LORA.theirs_on(copy.deepcopy(base), name="a")
    LORA.ours_on(ours, name="a"), LORA.ours_on(ours, name="b")
    theirs.add_adapter("b", LORA.settings())
    injection = peftcore.injections(ours)["a"]
    lora: Any = theirs.base_model

    def merge_ours() -> None:
        injection.merge()
        injection.unmerge()

    def merge_theirs() -> None:
        lora.merge_adapter(["a"])
        lora.unmerge_adapter()

    def switch_ours() -> None:
        for name in ("b", "a"):
            peftcore.activate(ours, name)

    def switch_theirs() -> None:
        for name in ("b", "a"):
            lora.set_adapter(name)

    with tempfile.TemporaryDirectory() as folder:
        own, other = Path(folder, "ours"), Path(folder, "theirs")
        injection.save(own)
        theirs.save_pretrained(other, selected_adapters=["a"])

        def load_ours() -> None:
            peftcore.load(ours, own, name="c").remove()

        def load_theirs() -> None:
            theirs.load_adapter(other / "a", "c")
            theirs.delete_adapter("c")

        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "switch": (switch_ours, switch_theirs),
            "save": (lambda: injection.save(own), lambda: theirs.save_pretrained(other, selected_adapters=["a"])),
            "load and remove": (load_ours, load_theirs),
            "merge and unmerge": (merge_ours, merge_theirs),
        }
        for figure, (mine, yours) in pairs.items():
            yield [compared(figure, take_turns({"ours": mine, "theirs": yours}, rounds), 1.0)]


def importing(rounds: int) -> Iterator[list[Row]]:
    """Measure the processor seconds that an import adds to ``import torch``."""

    def spent(module: str) -> float:
        script = IMPORT.format(module=module)
        done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])

    found: dict[str, list[float]] = {"peftcore": [], "peft": []}
    for _ in range(min(rounds, 7)):
        for module, seconds in found.items():
            seconds.append(spent(module))
    assert statistics.median(found["peftcore"]) > 0
    times = {"ours": np.array(found["peftcore"]), "theirs": np.array(found["peft"])}
    yield [compared("import, beyond torch", times, 0.12)]


FIGURES = (importing, injecting, around)
