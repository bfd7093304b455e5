"""Registers hooks within a ``with`` block, to try them without packaging a plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from peftcore.registry.plugins import registry


@contextmanager
def plugged(*hooks: Callable[..., Any]) -> Iterator[None]:
    """Context manager in which functions are registered as hooks, like those of a plugin. Each function is decorated
    with `peftcore.author.hookimpl`, and has the name of a hook.

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
