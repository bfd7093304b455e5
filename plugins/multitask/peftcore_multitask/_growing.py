"""Methods whose adapters grow: what was trained on some tasks goes on as a part of an adapter for more."""

from __future__ import annotations

import torch

from peftcore import AppliedMethod
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
