"""Hooks that are tried out without packaging a plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from peftcore.registry.plugins import registry


@contextmanager
def plugged(*hooks: Callable[..., Any]) -> Iterator[None]:
    """Let functions that are marked with `peftcore.author.hookimpl` answer hooks, as those of a plugin do, until the
    block ends.

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
