"""Ctrl-C and errors of torch while a choice is made, in a block or without: it is in force, or the one before is."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fault_scenes import CASES, scene
from torch import nn

import peftcore
from peftcore.forward.choice.scopes import Chosen
from peftcore.testing.faults import inject_faults
from peftcore.testing.snapshots import snapshot

NAMES = [
    "activate", "activate in a block", "activate a composition", "a composition in a block", "route",
    "route in a block", "using", "enabled in a block", "disabled in a block",
    "disabled in a block, merged",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_is_made_or_not(name: str) -> None:
    case = CASES[name]
    report = inject_faults(case.operation, case.make, name=name, every=16, often=1, seed=1, ends=case.ends)
    assert not report.found, report
    assert sum(report.tried.values()) > 5


BLOCKS: dict[str, Callable[[nn.Module], Chosen]] = {
    "activate": lambda model: peftcore.activate(model, "a"),
    "route": lambda model: peftcore.route(model, ["a", "b"]),
    "call": lambda model: peftcore.call(model, task="one"),
    "enabled": lambda model: peftcore.injections(model)["b"].enabled(),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_before_a_block_has_begun_its_choice_is_a_statement(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python tells nobody that ``with`` follows: an interrupt right before the block leaves the model as the call
    without a block does. Calls (`using`) have no such moment, see above."""
    scenes = [scene("a", "b")(tmp_path) for _ in range(2)]
    BLOCKS[name](scenes[0].model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Chosen, "__enter__", interrupt)
        with BLOCKS[name](scenes[1].model):
            pytest.fail("the block has begun")
    assert not snapshot(scenes[0]).differences(snapshot(scenes[1]))
    peftcore.activate(scenes[1].model, "b")
    peftcore.activate(scenes[0].model, "b")
    assert not snapshot(scenes[0]).differences(snapshot(scenes[1]))


def interrupt(_: object) -> None:
    raise KeyboardInterrupt
