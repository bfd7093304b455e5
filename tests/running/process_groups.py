"""The process group of a test, and how it is left."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def process_group(**where: Any) -> Iterator[None]:
    """Make this process one of a group on gloo.

    What holds the group has to be gone before the block ends, so it belongs into a function that the block calls: torch
    2.13 waits for ever where DDP's reducer is the last to let the group go. It does so with Python's lock, joins the
    threads of gloo, and one of them may want that lock for a tensor of the last collective.
    """
    dist.init_process_group("gloo", **where)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()
