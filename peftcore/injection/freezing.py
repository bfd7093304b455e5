"""The base is frozen while adapters are on it; what trained before trains again when the last one leaves."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def thawed(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters of the base that train, each once: tied ones have several places."""
    return list({id(each): each for each in parameters if each.requires_grad}.values())


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Let no gradient be made for parameters of the base."""
    for parameter in parameters:
        parameter.requires_grad_(False)


def thaw(parameters: Iterable[nn.Parameter]) -> None:
    """Let parameters of the base train again."""
    for parameter in parameters:
        parameter.requires_grad_(True)
