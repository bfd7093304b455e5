"""Freezes the base while adapters are on it, and lets it train again when the last one is removed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def thawed(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Returns parameters of the base that train, each once: tied ones are held by several modules."""
    return list({id(each): each for each in parameters if each.requires_grad}.values())


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Turn off requires_grad for parameters of the base."""
    for parameter in parameters:
        parameter.requires_grad_(False)


def thaw(parameters: Iterable[nn.Parameter]) -> None:
    """Turn on requires_grad for parameters of the base."""
    for parameter in parameters:
        parameter.requires_grad_(True)
