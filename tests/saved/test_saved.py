"""Adapters that were saved before the tree was put in order compute what they computed then, one for each method."""

from pathlib import Path
from typing import Any

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


FORMER: dict[str, dict[str, Any]] = {
    "adapterdrop": {"drop_first_layers": 5},
    "adaptformer": {"dropout": 0.0},
    "attempt": {"train_norm": True},
    "attention_only": {"head": False, "positions": False},
    "bi_adaptformer": {"dropout": 0.0},
    "bitfit": {"head": False},
    "child_tuning_d": {"training": False, "others": False},
    "convpass": {"dropout": 0.0},
    "corda": {"alpha": 128.0},
    "fact_tk": {"dropout": 0.0},
    "fact_tt": {"dropout": 0.0},
    "houlsby_adapter": {"train_layer_norm": "blocks"},
    "hydralora": {"rank": 8, "dropout": 0.0},
    "lidb": {"alpha": 1.0},
    "loreft": {"short_prompts": "first"},
    "p_tuning_v2": {"behind": False},
    "prefix_tuning": {"behind": False},
    "repadapter": {"dropout": 0.0},
    "svdiff": {"vectors": "one"},
    "tlora": {"alpha": 64.0},
}
"""Defaults of the first version of a method's options that another version has changed."""


@pytest.mark.parametrize("name", FORMER)
def test_what_options_of_a_first_version_do_not_say_is_the_default_of_then(name: str) -> None:
    """Parts of a hybrid say in its file what the user said, and no more."""
    kind = peftcore.method(name)
    options = kind.migrate({"method": name}, 1)
    assert {key: options.get(key) for key in FORMER[name]} == FORMER[name]
    now = kind.Config().model_dump()
    assert all(now[key] != value for key, value in FORMER[name].items())
