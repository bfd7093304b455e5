"""Libraries log and warn about each other and about configurations, which is no news to someone who only looks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unlogged() -> Iterator[None]:
    """No log but errors, until the end of the block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def quiet() -> Iterator[None]:
    """The same, and no warnings."""
    with unlogged(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
