"""Many adapters on one host: what is done with one of them costs what it costs beside a few. And many sites: each costs
what it costs among a few."""

import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from core_toys import Shift, Transformer, stir, token_ids, transformer

import peftcore

TARGET = "all-linear"
SITES_OF_A_LAYER = 6
SITES = 2 * SITES_OF_A_LAYER


def resident(count: int, depth: int = 2) -> Transformer:
    """A host that has this many adapters, of which one acts, and has run."""
    model = transformer(depth)
    for number in range(count):
        peftcore.activate(model)
        peftcore.apply(model, Shift, target=TARGET, name=f"a{number}")
    peftcore.activate(model, "a0")
    model(token_ids())
    assert len(peftcore.injections(model)["a0"].sites) == depth * SITES_OF_A_LAYER
    return model


def applied(model: Transformer, folder: Path) -> None:
    peftcore.apply(model, Shift, target=TARGET, name="new")


def loaded(model: Transformer, folder: Path) -> None:
    peftcore.load(model, folder, name="new")


def merged(model: Transformer, folder: Path) -> None:
    peftcore.injections(model)["a0"].merge()


def merged_and_back(model: Transformer, folder: Path) -> None:
    merged(model, folder)
    peftcore.injections(model)["a0"].unmerge()


def removed(model: Transformer, folder: Path) -> None:
    peftcore.injections(model)["a1"].remove()


def saved(model: Transformer, folder: Path) -> None:
    peftcore.injections(model)["a0"].save(folder / "again")


def switched(model: Transformer, folder: Path) -> None:
    peftcore.activate(model, "a1")
    model(token_ids())


def routed(model: Transformer, folder: Path) -> None:
    with peftcore.route(model, ["a1", "a0"]):
        model(token_ids())


def instructions(act: Callable[[], None]) -> int:
    """How many instructions of Python an act takes: its time, on a machine where nothing else happens. What others left
    behind is let go before, since their finalizers would count."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return note

    gc.collect()
    before = sys.gettrace()
    gc.disable()
    sys.settrace(note)
    try:
        act()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


ACTS = [applied, loaded, merged, merged_and_back, removed, saved, switched, routed]


@pytest.mark.parametrize("act", ACTS)
def test_the_number_of_residents_costs_nothing(
    act: Callable[[Transformer, Path], None], tmp_path: Path, fresh_registry: None
) -> None:
    peftcore.register(Shift)
    peftcore.injections(resident(1))["a0"].save(tmp_path)
    act(resident(2), tmp_path)  # what a process does once
    few, many = 4, 44
    hosts = [resident(few), resident(many)]
    beside_few, beside_many = (instructions(partial(act, host, tmp_path)) for host in hosts)
    each = (beside_many - beside_few) / (many - few)
    assert each < 2 * SITES  # a look at its name, and none at its sites


@pytest.mark.share(2)
@pytest.mark.parametrize("act", ACTS)
def test_another_site_costs_what_the_others_do(
    act: Callable[[Transformer, Path], None], tmp_path: Path, fresh_registry: None
) -> None:
    peftcore.register(Shift)
    spent = []
    for depth in (4, 4, 12, 20):  # the first time has what a process does once
        folder = tmp_path / f"{len(spent)}"
        peftcore.injections(resident(1, depth))["a0"].save(folder)
        spent.append(instructions(partial(act, resident(2, depth), folder)))
    _, few, more, most = spent
    assert 0.99 < (most - more) / (more - few) < 1.01


def test_a_loaded_adapter_may_wait(tmp_path: Path, fresh_registry: None) -> None:
    peftcore.register(Shift)
    source = resident(1)
    stir(peftcore.injections(source)["a0"])
    peftcore.injections(source)["a0"].save(tmp_path)
    model, ids = transformer(), token_ids()
    plain = model(ids)
    first = peftcore.load(model, tmp_path, name="first", active=False)
    assert not first.active and torch.equal(model(ids), plain)
    with peftcore.route(model, [None, "first"]):
        other = peftcore.load(model, tmp_path, name="other", active=False)
        rows = model(ids)  # the route is as it was
    torch.testing.assert_close(rows, torch.stack([plain[0], source(ids)[1]]))
    assert not other.active and torch.equal(model(ids), plain)
    peftcore.activate(model, "other")
    torch.testing.assert_close(model(ids), source(ids))
