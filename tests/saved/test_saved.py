"""Adapters that were saved before the tree was put in order compute what they computed then, one for each method."""

from pathlib import Path

import pytest
import torch
from saved_adapters import HERE, Saved, difference

import peftcore

FOLDERS = sorted(path.parent for path in HERE.glob("*/adapter.json"))
PLUGINS = {path.name for path in HERE.parents[1].glob("plugins/*")}
TOLERANCE = 1e-6
"""Largest difference of outputs, relative to the largest one."""
MOVED = 1e-3
"""What an adapter changes at least; otherwise its output would prove nothing."""


def test_each_method_has_one() -> None:
    methods = {info.name for info in peftcore.methods() if info.plugin in PLUGINS}
    assert {folder.name.partition("-")[0] for folder in FOLDERS} == methods


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_loads_and_computes_the_same(folder: Path) -> None:
    saved = Saved.read(folder)
    model = saved.base()
    bare = saved.run(model)
    injection = peftcore.load(model, folder)
    assert injection.method.name == folder.name.partition("-")[0]
    output = saved.run(model)
    assert output.dtype == saved.output.dtype == torch.float64
    assert difference(output, saved.output) <= TOLERANCE
    assert difference(bare, saved.output) >= MOVED


def test_a_difference_is_seen() -> None:
    """A change by a thousandth of one factor is more than the tolerance."""
    saved = Saved.read(HERE / "lora")
    model = saved.base()
    injection = peftcore.load(model, HERE / "lora")
    with torch.no_grad():
        next(iter(injection.parameters())).mul_(1.001)
    assert difference(saved.run(model), saved.output) > TOLERANCE
