"""What holds for every test of the core and of the plugins: no network, one thread, known seeds."""

import gc
import os
import random
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, so it is set before any test module is

import numpy as np
import pytest
import torch

import peftcore.catalogue

torch.set_num_threads(1)
gc.set_threshold(100_000, 20, 20)  # looking through all that torch and transformers made took a fifteenth of all time


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Each test starts from the same state of the global generators, in whatever order and process it runs."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """What a test registers at run time ends with it: other tests go through all methods that there are."""
    before = dict(peftcore.catalogue._registered)
    yield
    peftcore.catalogue._registered.clear()
    peftcore.catalogue._registered.update(before)
