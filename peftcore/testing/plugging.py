"""Registers hooks for a block, to try them without packaging a plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from peftcore.registry.plugins import registry


@contextmanager
def plugged(*hooks: Callable[..., Any]) -> Iterator[None]:
    """Context manager in which functions marked with `peftcore.author.hookimpl` are registered as hooks, like those of
    a plugin.

    Example:
        with plugged(peftcore_layer):
            injection = peftcore.apply(model, "lora", target="0")
    """
    plugin = SimpleNamespace(**{hook.__name__: hook for hook in hooks})
    registry().manager.register(plugin)
    try:
        yield
    finally:
        registry().manager.unregister(plugin)
