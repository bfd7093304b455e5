"""Tensors that a call passes to a method, such as a condition image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.author import forward_context
from peftcore.errors import RouteError


def told(name: str, rows: int) -> Tensor:
    """Return the tensor of that name in ``peftcore.call(model, ...)`` with one entry for each of the given number of
    rows. Entries are repeated if a module gets several rows for one entry (frames), if one image is for all rows, or if
    the call declares that rows of the batch repeat (guidance).

    Raises:
        MissingContext: the call does not pass the tensor.
        RouteError: there are not as many rows.
    """
    return _each(forward_context().for_rows(name, rows), rows)


def _each(value: Tensor, rows: int) -> Tensor:
    return value if len(value) == rows else value.repeat_interleave(rows // len(value), 0)


def timesteps(rows: int, device: torch.device) -> Tensor:
    """Return the diffusion timestep of each row, [rows]. It is the value of ``peftcore.call(model, timestep=...)``, a
    number or one number for each row, or else the host's argument ``timestep``.

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
