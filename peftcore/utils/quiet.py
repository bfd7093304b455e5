"""Silences the logs and warnings of other libraries, which do not help users who only inspect models."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOUD_IMPORTS = ("bitsandbytes.backends", "diffusers.quantizers", "torch.utils._pytree", "torchao")
"""Loggers of libraries that report missing optional parts when they are imported, such as kernels for other devices."""


def hush_imports() -> None:
    """Make the loggers in `LOUD_IMPORTS` log only errors for the rest of the process.

    The command line calls it once, before it imports any library. ``peftcore doctor`` reports which schemes cannot work
    on this machine, and why.
    """
    for name in LOUD_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def unlogged() -> Iterator[None]:
    """Context manager in which only errors are logged."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        yield
    finally:
        logging.disable(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager in which only errors are logged and no warnings are shown."""
    with unlogged(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def no_bars() -> None:
    """Switch off the progress bars of transformers and datasets and the warnings of transformers, if these libraries
    are installed. They would appear between peftcore's own lines."""
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        logger: Any = transformers.logging
        logger.set_verbosity_error()
        logger.disable_progress_bar()
