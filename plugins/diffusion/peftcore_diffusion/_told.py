"""Tensors that a call gives to a method, such as the image of a condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.author import forward_context
from peftcore.errors import RouteError


def told(name: str, rows: int) -> Tensor:
    """Return the tensor of that name in ``peftcore.call(model, ...)``, one entry for each of so many rows: repeated
    where a module sees several rows of one (frames), where one image is for all, or as calls say that the batch does.

    Raises:
        MissingContext: the call does not pass the tensor.
        RouteError: there are not as many rows.
    """
    return _each(forward_context().for_rows(name, rows), rows)


def _each(value: Tensor, rows: int) -> Tensor:
    return value if len(value) == rows else value.repeat_interleave(rows // len(value), 0)


def timesteps(rows: int, device: torch.device) -> Tensor:
    """Return the timestep of diffusion of each of so many rows, [rows]: what ``peftcore.call(model, timestep=...)``
    says, a number or one for each row, and otherwise the argument of that name with which the host was called.

    Raises:
        MissingContext: neither the call nor the host's arguments contain the timestep.
        RouteError: there are not as many rows.
    """
    running = forward_context()
    said, given = running.told("timestep"), running.inputs.get("timestep")
    if said is None and given is not None:  # by the host's caller, of the operator's own rows
        value = torch.as_tensor(given, device=device).flatten()
        if rows % len(value):
            raise RouteError(f"timestep has {len(value)} entries, but a module gets {rows} rows; exclude this module")
        return _each(value, rows)
    value = torch.as_tensor(running.need("timestep") if said is None else said, device=device).flatten()
    return _each(running.for_rows("timestep", rows, value), rows)


def cast(value: Any, like: Tensor) -> Any:
    """Cast floating-point tensors to the dtype of `like`, also those in a mapping; return all else as it is."""
    if isinstance(value, Mapping):
        return {name: cast(each, like) for name, each in value.items()}
    return value.to(like.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
