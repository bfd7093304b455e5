"""Methods whose adapters grow with tasks: copies a trained adapter's values into one for more tasks, and computes the
loss that keeps the shares of texts of earlier tasks."""

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
    """Return the divergence of shares from target shares, as a mean over the rows that have targets.

    Args:
        told: ``[rows, tasks]``; a row of zeros is skipped.
        logs: the logarithms of the shares ``[rows, tasks]``.

    Raises:
        ConfigError: the target shares have another number of rows or tasks.
    """
    told = torch.as_tensor(told).to(logs)
    if told.shape != logs.shape:
        raise ConfigError(f"attention={tuple(told.shape)}: shares of rows and tasks are {tuple(logs.shape)} here")
    return (torch.special.xlogy(told, told) - told * logs).sum() / told.any(1).sum().clamp(min=1)
