"""Methods whose adapters grow: what was trained on some tasks goes on as a part of an adapter for more,
and what was said of texts of these tasks is held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftcore.author import AppliedMethod
from peftcore.errors import ConfigError


def take_tasks(injection: AppliedMethod, trained: AppliedMethod) -> None:
    """Give an adapter the values of one of the same method that was trained on fewer tasks: each tensor that both have.

    Raises:
        ConfigError: they are not such adapters, at the same modules and with the same sizes; nothing has changed.
    """
    mine, theirs = (
        {f"{path}:{name}": value for path, op in each.operators.items() for name, value in op.named_parameters()}
        for each in (injection, trained)
    )
    kinds = {(type(each.config), frozenset(each.operators)) for each in (injection, trained)}
    if len(kinds) > 1 or any(name not in mine or mine[name].shape != value.shape for name, value in theirs.items()):
        raise ConfigError(
            "take_tasks(more, fewer) is for two adapters of one method, at the same modules and with the same sizes, "
            "of which the first knows the tasks of the other, and more"
        )
    with torch.no_grad():
        for name, value in theirs.items():
            mine[name].copy_(value)


def divergence(told: Any, logs: Tensor) -> Tensor:
    """Return how far shares are from those that are told, as a mean over the rows that have some.

    Args:
        told: ``[rows, tasks]``; a row of zeros has none.
        logs: the logarithms of the shares ``[rows, tasks]``.

    Raises:
        ConfigError: they are told for other rows, or for other tasks.
    """
    told = torch.as_tensor(told).to(logs)
    if told.shape != logs.shape:
        raise ConfigError(f"attention={tuple(told.shape)}: shares of rows and tasks are {tuple(logs.shape)} here")
    return (torch.special.xlogy(told, told) - told * logs).sum() / told.any(1).sum().clamp(min=1)
