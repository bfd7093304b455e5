"""Tensors that a call passes to a method, such as a condition image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.author import forward_context
from peftcore.errors import RouteError


def told(name: str, rows: int) -> Tensor:
    """Return the tensor that ``peftcore.call(model, ...)`` passes under a name, with one entry for each of `rows` rows.
    Entries are repeated in three cases: the tensor has one entry for all rows, a module gets several rows for each
    entry (frames of a video), or the call declares that rows of the batch repeat (classifier-free guidance).

    Raises:
        MissingContext: the call does not pass the tensor.
        RouteError: the number of entries does not fit the number of rows.
    """
    return _each(forward_context().for_rows(name, rows), rows)


def _each(value: Tensor, rows: int) -> Tensor:
    return value if len(value) == rows else value.repeat_interleave(rows // len(value), 0)


def timesteps(rows: int, device: torch.device) -> Tensor:
    """Return the diffusion timestep of each row, [rows]. It is the value that ``peftcore.call(model, timestep=...)``
    passes, or else the host's argument ``timestep``. Either may be one number, or one for each row.

    Raises:
        MissingContext: neither the call nor the host's arguments contain the timestep.
        RouteError: the number of timesteps does not fit the number of rows.
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
    """Return a tensor, or a mapping of tensors, with floating-point tensors cast to the dtype of `like`. All other
    values are returned unchanged."""
    if isinstance(value, Mapping):
        return {name: cast(each, like) for name, each in value.items()}
    return value.to(like.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
