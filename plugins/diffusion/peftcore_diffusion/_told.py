"""Tensors that a call gives to a method, such as the image of a condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore import forward_context
from peftcore.errors import RouteError


def told(name: str, rows: int) -> Tensor:
    """Return the tensor of that name in ``peftcore.call(model, ...)``, one entry for each of so many rows: repeated
    where a module sees several rows of one (frames), or where one image is for all.

    Raises:
        MissingContext: nobody said it.
        RouteError: there are not as many rows.
    """
    value: Tensor = forward_context().need(name)
    times, rest = divmod(rows, len(value))
    if rest or not times:
        raise RouteError(
            f"{name} has {len(value)} entries, and the batch {rows}; give one for each row, or one for all"
        )
    return value if times == 1 else value.repeat_interleave(times, 0)


def timesteps(rows: int, device: torch.device) -> Tensor:
    """Return the timestep of diffusion of each of so many rows, [rows]: what ``peftcore.call(model, timestep=...)``
    says, a number or one for each row, and otherwise the argument of that name with which the host was called.

    Raises:
        MissingContext: nobody said it, and the host has no such argument.
        RouteError: there are not as many rows.
    """
    running = forward_context()
    said = running.context.get("timestep", running.inputs.get("timestep"))
    value = torch.as_tensor(running.need("timestep") if said is None else said, device=device).flatten()
    times, rest = divmod(rows, len(value))
    if len(value) > 1 and (rest or not times):
        raise RouteError(f"timestep has {len(value)} entries, and a module is given {rows} rows; exclude that module")
    return value.expand(rows) if len(value) == 1 else value.repeat_interleave(times, 0)


def cast(value: Any, like: Tensor) -> Any:
    """Cast floating-point tensors to the dtype of `like`, also those in a mapping; return all else as it is."""
    if isinstance(value, Mapping):
        return {name: cast(each, like) for name, each in value.items()}
    return value.to(like.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
