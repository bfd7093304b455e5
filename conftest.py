"""What holds for every test of the core and of the plugins: no network, one thread, known seeds."""

import gc
import os
import random
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, so it is set before any test module is

import numpy as np
import pytest
import torch

import peftcore.registry.catalogue

torch.set_num_threads(1)
gc.set_threshold(100_000, 20, 20)  # looking through all that torch and transformers made took a fifteenth of all time


def pytest_collection_finish() -> None:
    """What was imported stays, and is not looked through again."""
    gc.collect()
    gc.freeze()


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


TOGETHER = (
    "tests/packaging/",
    "tests/cli/test_compare.py",
    "tests/comparing/comparisons/test_demo.py",
    "tests/torch_interop/test_distributed.py",
    "[it_learns",
)
"""Parts of names of tests that share something that takes long to make: they run in one worker."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Pytest 9.2 took away what pytest-xdist 3.8 marks groups by, and says nothing."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((name for name in TOGETHER if name in nodeid), nodeid)

    return ByGroup(config, log)
