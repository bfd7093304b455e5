"""Silences libraries, which log and warn about each other and about configurations: no news to someone who only
looks."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOUD_IMPORTS = ("bitsandbytes.backends", "diffusers.quantizers", "torch.utils._pytree", "torchao")
"""Loggers of libraries that report, while they are imported, which of their own parts this machine does not have:
kernels of other devices and versions, which nobody asked for."""


def hush_imports() -> None:
    """Let the loggers of `LOUD_IMPORTS` log nothing but errors, for the rest of the process.

    The command line says it once, before any library is imported. ``peftcore doctor`` tells which schemes cannot work
    here, and why.
    """
    for name in LOUD_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def unlogged() -> Iterator[None]:
    """Log nothing but errors, until the end of the block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Log nothing but errors and show no warnings, until the end of the block."""
    with unlogged(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def no_bars() -> None:
    """Switch off progress bars of transformers and datasets, if these are installed, and their advice, which would
    stand between our own lines."""
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        logger: Any = transformers.logging
        logger.set_verbosity_error()
        logger.disable_progress_bar()
