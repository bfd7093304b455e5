"""Freezes the base while adapters are on it, and lets it train again when the last one is removed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from peftcore.utils.journal import Journal


def freeze(journal: Journal, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Turn off requires_grad; returns the parameters that trained, each once: tied ones are held by several modules."""
    trained = []
    for parameter in parameters:
        if parameter.requires_grad:
            trained.append(parameter)
        journal.call(_let_train, parameter, parameter.requires_grad, False)
    return trained


def thaw(journal: Journal, parameters: Iterable[nn.Parameter]) -> None:
    """Turn on requires_grad, except for parameters that other code has quantized in place: integers do not train."""
    for parameter in parameters:
        if parameter.is_floating_point() or parameter.is_complex():
            journal.call(_let_train, parameter, parameter.requires_grad, True)


def _let_train(parameter: nn.Parameter, trains: bool) -> None:
    with torch.inference_mode(parameter.is_inference()):  # parameters that were made in it are changed in it alone
        parameter.requires_grad_(trains)
