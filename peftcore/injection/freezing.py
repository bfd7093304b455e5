"""Freezes the base while adapters are on it, and lets it train again when the last one is removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from peftcore.utils.journal import Journal


def freeze(journal: Journal, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Turn off requires_grad. Returns the parameters that were trainable. A parameter that several modules share is
    returned once."""
    every = list({id(each): each for each in parameters}.values())
    before = [each.requires_grad for each in every]
    journal.call(_set, every, before, [False] * len(every))
    return [each for each, trained in zip(every, before, strict=True) if trained]


def thaw(journal: Journal, parameters: Iterable[nn.Parameter]) -> None:
    """Turn on requires_grad, except for parameters that other code has quantized in place: integers do not train."""
    every = [each for each in parameters if each.is_floating_point() or each.is_complex()]
    journal.call(_set, every, [each.requires_grad for each in every], [True] * len(every))


def _set(parameters: Sequence[nn.Parameter], train: Sequence[bool]) -> None:
    for parameter, trains in zip(parameters, train, strict=True):
        if parameter.requires_grad is not trains:
            with torch.inference_mode(parameter.is_inference()):  # one that was made in it is changed in it alone
                parameter.requires_grad_(trains)
