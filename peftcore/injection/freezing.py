"""Freezes the base while adapters are on it, and lets it train again when the last one is removed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftcore.utils.journal import Journal


def freeze(journal: Journal, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Turn off requires_grad; returns the parameters that trained, each once: tied ones are held by several modules."""
    trained = []
    for parameter in parameters:
        if parameter.requires_grad:
            trained.append(parameter)
        journal.set(parameter, "requires_grad", False)
    return trained


def thaw(journal: Journal, parameters: Iterable[nn.Parameter]) -> None:
    """Turn on requires_grad."""
    for parameter in parameters:
        journal.set(parameter, "requires_grad", True)
