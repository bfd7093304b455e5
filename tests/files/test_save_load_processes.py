"""Processes that save to one folder, and that load while others save: each finds one adapter, whole."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killed import in_child
from slowly import quick

import peftcore
from peftcore.errors import CheckpointError
from peftcore.files.save_load import describe
from peftcore.injection.injection import injections
from peftcore.testing import HOSTS

FORMATS = ["peftcore", "peft", "mlx", "kohya", "diffusers", "gguf"]
WRITTEN_ONLY = ("mlx", "gguf")
"""Formats that peftcore writes and describes, and does not load."""


def adapter(number: int) -> peftcore.Injection:
    """One whose tensors and options both tell its number."""
    torch.manual_seed(0)
    rank = 1 + number % 3
    injection = peftcore.apply(
        HOSTS["llama"].build()[0], "lora", rank=rank, alpha=2.0 * rank, target=["attn.q", "attn.v"]
    )
    fill(injection, number)
    return injection


def fill(injection: peftcore.Injection, number: int) -> None:
    with torch.no_grad():
        for each in injection.parameters():
            each.fill_(float(number))


def in_children(works: list[Callable[[], None]], kills: random.Random | None = None) -> list[int]:
    """Do each in a process of its own, at once; returns the exit codes. With `kills` the first is killed by SIGKILL at
    a random moment."""
    children = []
    for work in works:
        if not (child := os.fork()):
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    if kills is not None:
        time.sleep(kills.uniform(0.0, 0.05))
        os.kill(children[0], signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def check(injection: peftcore.Injection) -> None:
    """Expect the tensors and options of one adapter."""
    values = {float(value) for each in injection.parameters() for value in each.unique()}
    assert len(values) == 1, values
    assert injection.config.rank == 1 + int(values.pop()) % 3


ROUNDS = 8


@pytest.mark.parametrize("format", quick(FORMATS, ["peft"]))
def test_two_that_save_and_one_that_loads(format: str, tmp_path: Path) -> None:
    adapters = [adapter(number) for number in range(3)]
    model = HOSTS["llama"].build()[0]
    adapters[0].save(tmp_path / "a", format=format)

    def saves(number: int) -> None:
        draw = random.Random(number)
        for _ in range(ROUNDS):
            adapters[number].save(tmp_path / "a", format=format)
            time.sleep(draw.uniform(0.0, 0.01))

    def loads() -> None:
        for _ in range(2 * ROUNDS):
            if format not in WRITTEN_ONLY:
                injection = peftcore.load(model, tmp_path / "a")
                check(injection)
                injection.remove()
            describe(tmp_path / "a")

    assert in_children([lambda: saves(1), lambda: saves(2), loads]) == [0, 0, 0]
    if format not in WRITTEN_ONLY:
        check(peftcore.load(model, tmp_path / "a"))
    assert not [*(tmp_path / "a").glob(".*.partial")]


@pytest.mark.parametrize("seed", quick(range(40), [0]))
@pytest.mark.parametrize("format", ["peft", "peftcore"])
def test_one_that_is_killed_leaves_no_mixture_and_holds_up_no_other(format: str, seed: int, tmp_path: Path) -> None:
    """A format of several files may lack some of them then, which `load` says; the next save makes it whole."""
    draw = random.Random(seed)
    adapters = [adapter(number) for number in range(3)]
    model = HOSTS["llama"].build()[0]
    adapters[0].save(tmp_path / "a", format=format)

    def saves() -> None:
        number = 0
        while True:
            number += 1
            adapters[number % 3].save(tmp_path / "a", format=format)

    for _ in range(4):
        in_children([saves], draw)
        try:
            injection = peftcore.load(model, tmp_path / "a")
        except CheckpointError:
            assert format != "peftcore"
        else:
            check(injection)
            injection.remove()
    adapters[1].save(tmp_path / "a", format=format)
    injection = peftcore.load(model, tmp_path / "a")
    check(injection)
    assert float(next(injection.parameters()).mean()) == 1.0


def test_a_composition_that_is_half_saved_is_none(tmp_path: Path) -> None:
    model = HOSTS["llama"].build()[0]
    parts = [peftcore.apply(model, "lora", name=name, rank=2, target=["attn.q"]) for name in ("a", "b")]
    folder = tmp_path / "both"

    def save(number: int) -> None:
        for each in parts:
            fill(each, number)
        peftcore.save_composition(model, peftcore.Sum("a", "b"), folder)

    save(1)
    points = in_child(lambda: save(2), folder)
    assert points is not None
    seen = set()
    for number in range(1, len(points) + 1, 4):
        shutil.rmtree(folder)
        save(1)
        assert in_child(lambda: save(2), folder, number) is None
        other = HOSTS["llama"].build()[0]
        try:
            peftcore.load_composition(other, folder)
        except CheckpointError:
            seen.add(0.0)
        else:
            tensors = [each for injection in injections(other).values() for each in injection.parameters()]
            found = {float(value) for each in tensors for value in each.unique()}
            assert len(found) == 1
            seen |= found
    assert 0.0 in seen and seen <= {0.0, 1.0, 2.0}
