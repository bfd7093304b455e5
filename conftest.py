"""What holds for every test of the core and of the plugins: no network, one thread, known seeds."""

import gc
import itertools
import os
import random
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, so it is set before any test module is

import covering
import numpy as np
import pytest
import torch

import peftcore.registry.catalogue

torch.set_num_threads(1)
gc.set_threshold(100_000, 20, 20)  # looking through all that torch and transformers made took a fifteenth of all time


OFTEN = 300
"""After how many tests what is there is frozen."""

pytest_plugins = ["processor_time", "scheduling", "uncompiled", "peftcore.testing.gathering"]


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Among what the command line asks for, what `covering` chooses."""
    turns = covering.turns(items)
    covering.mark_slow(items, turns)  # before `-m` is asked
    yield
    chosen = covering.covering(items, turns)
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def freeze() -> None:
    """What is there stays, and is not looked through again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    freeze()


ran = itertools.count(1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Modules that are imported late, graphs and caches come to some millions of objects in a whole run, which each
    `gc.collect()` of a trainer or a test would look through: seconds, many hundred times."""
    if next(ran) % OFTEN == 0:
        freeze()


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Each test starts from the same state of the global generators, in whatever order and process it runs."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch's own way notes the stack of calls, for devices that are not there


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """What a test registers at run time ends with it: other tests go through all methods that there are."""
    before = dict(peftcore.registry.catalogue._registered)
    yield
    peftcore.registry.catalogue._registered.clear()
    peftcore.registry.catalogue._registered.update(before)
