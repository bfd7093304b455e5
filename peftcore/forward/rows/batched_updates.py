"""Adds the low-rank updates of many adapters with one batched product, if the rows of a batch use different
adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.contract.operators import Factors
from peftcore.forward.choice.active_adapters import Route
from peftcore.forward.rows.stacked_operators import stacked
from peftcore.forward.tensors.mount import Mount
from peftcore.layers.layer import put, take


def add_updates(
    updates: Sequence[tuple[int, Mount, Factors]], route: Route, y: Tensor, x: Tensor, new: bool = False
) -> Tensor:
    """Returns the output of a module plus the low-rank updates of several injections, each for its rows. Uses two
    batched products for all injections.

    Args:
        updates: mounts (operators at their sites) whose operators are low-rank updates of vectors, with the positions
            of their injections in the route and their factors.
        route: the injection of each row.
        y: the module's output without the updates ``[rows, ..., out]``.
        x: the module's input ``[rows, ..., in]``.
        new: whether `y` was made for this call and may be changed in place.
    """
    tokens = x.reshape(len(x), -1, x.shape[-1])
    for slices in dict.fromkeys(mount.slices for _, mount, _ in updates):
        factors = {position: each for position, mount, each in updates if mount.slices == slices}
        A, B, scales = _of_rows(factors, route, len(x), y)
        low = (tokens.to(y.dtype) @ A.mT) * scales.view(-1, 1, 1)
        if new and slices is None and type(y) is Tensor and y.is_contiguous():
            y.view(len(x), -1, y.shape[-1]).baddbmm_(low, B.mT)
            continue
        part = take(y, slices, -1)
        changed = torch.baddbmm(part.reshape(len(x), -1, part.shape[-1]), low, B.mT)
        y = put(y, changed.view(part.shape), slices, -1)
    return y


def _of_rows(factors: Mapping[int, Factors], route: Route, count: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns A ``[count, rank, in]``, B ``[count, out, rank]`` and a scale for each of `count` rows. They are zero for
    rows of the base model, and for injections without an update at this module. Lower ranks are padded with zeros."""
    first, second, _ = next(iter(factors.values()))
    rank = max(len(A) for A, _, _ in factors.values())
    nothing = first.new_zeros(rank, first.shape[1]), second.new_zeros(len(second), rank), 0.0
    each = [_filled(factors[n], rank) if n in factors else nothing for n in range(len(route.names))] + [nothing]
    laid = not torch.compiler.is_compiling() and bool(route.positions)  # no graph may depend on the assignment of rows
    if laid:  # side by side at once, not one of each first and then by row
        times = count // len(route.positions)
        each = [each[n] for n in route.positions for _ in range(times)]
    As, Bs, scales = (list(part) for part in zip(*each, strict=True))
    A, B, scale = stacked(As).to(like.dtype), stacked(Bs).to(like.dtype), like.new_tensor(scales)
    if laid:
        return A, B, scale
    index = route.rows(count, like.device)
    return A[index], B[index], scale[index]


def _filled(factors: Factors, rank: int) -> Factors:
    A, B, scale = factors
    lacking = rank - len(A)
    return (F.pad(A, (0, 0, 0, lacking)), F.pad(B, (0, lacking)), scale) if lacking else factors
