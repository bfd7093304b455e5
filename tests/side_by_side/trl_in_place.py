"""A plugin of pytest for `trl_tests`: TRL's tests of adapters, with data sets that were made here; and, where the
environment says so, with `peftcore.compat` in the place of what they and TRL import from peft."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest

HUB, OURS = "PEFTCORE_TRL_HUB", "PEFTCORE_TRL_OURS"
"""Variables of the environment: the folder of `trl_hub.Hub`, and whether ours is in peft's place."""
NAMES = ("peft", "lora")
"""What is in the name of a test that is run."""
_load_dataset = datasets.load_dataset


def load_dataset(path: str, name: str = "default", *more: Any, split: str | None = None, **options: Any) -> Any:
    """Returns a data set that was made here; others as before."""
    there = Path(os.environ[HUB], "zen", path, name)
    if not there.exists():
        return _load_dataset(path, name, *more, split=split, **options)
    return _load_dataset("parquet", data_files={each.stem: str(each) for each in there.iterdir()}, split=split)


def put_in_place() -> None:
    """Put ours in the place of what TRL and its tests have imported from peft. peft itself, of which ours makes use,
    stays as it is."""
    from peftcore import compat

    both = vars(peft).keys() & set(compat.__all__)
    ours = {id(vars(peft)[name]): vars(compat)[name] for name in both}
    for module in [each for name, each in sys.modules.items() if name.split(".")[0] in ("trl", "tests")]:
        for name, value in list(vars(module).items()):
            if id(value) in ours:
                setattr(module, name, ours[id(value)])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Put ours in place where that is wanted: before each test, since TRL imports what is asked for, and no sooner."""
    if os.environ.get(OURS):
        put_in_place()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of other things."""
    chosen = [each for each in items if any(name in each.name.split("[")[0].lower() for name in NAMES)]
    config.hook.pytest_deselected(items=[each for each in items if each not in chosen])
    items[:] = chosen


datasets.load_dataset = load_dataset
