"""T-LoRA in files of LyCORIS, which is read as PiSSA (checked against LyCORIS 4.1).

    W' = W + s (P diag(l) Q - P0 diag(l0) Q0),   P0 diag(l0) Q0 the principal part of W,   s = alpha / rank

``q_layer`` Q is A of peftcore's PiSSA, and ``p_layer`` P multiplied by ``lambda_layer`` l is its B. The file lacks the
initial values. LyCORIS computes them again as the principal part of the base, even if training started elsewhere, and
so does this translation. If s is not 1, PiSSA scales its initial factors differently from T-LoRA. Such adapters can be
read but not written.

In training, and with samplers that enable it, T-LoRA omits ranks depending on the timestep. Otherwise it uses all
ranks, as peftcore does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Size, Tensor

from peftcore.author.formats import Found, Held, KohyaMethod, Place, spelled
from peftcore.errors import CheckpointError, ExportError
from peftcore_reparameterized._decomposed import principal
from peftcore_reparameterized._rotations import precise

Q, P, VALUES = "q_layer.weight", "p_layer.weight", "lambda_layer"
NEAR = 1e-4
"""The largest accepted difference between the initial values and the principal part of the base, relative to the
largest entry of the latter."""


class KohyaTLoRA(KohyaMethod):
    """Translates factors that start at the principal part of the base, and their initial values."""

    methods = ("pissa",)
    below = (Q, P, VALUES)
    telling = (VALUES,)

    def options(self, held: Held) -> dict[str, Any]:
        rank, file = held.size(VALUES, 1), held.where.rpartition(": ")[0]
        if math.prod(held.weight[2:]) != 1 or rank > min(held.weight[:2]):
            raise CheckpointError(
                f"{held.where}: T-LoRA of rank {rank} does not fit a weight {tuple(held.weight)} in peftcore; remove "
                "the tensors of this module from the file"
            )
        warnings.warn(
            f"{file} is of T-LoRA, which can drop ranks by the timestep: here all ranks act at all timesteps, as in "
            "LyCORIS without a timestep",
            UserWarning,
            stacklevel=2,
        )
        return {"rank": rank, "alpha": held.alpha(rank)}

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        return next(iter(shapes.get(P, ())), -1)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        A, B = place.operator.A.shape, place.operator.B.shape
        values = found.take(VALUES, (1, A[0]))
        A0, B0 = _start(place, A[0])
        return {
            "A": found.take(Q, *spelled(A)), "B": found.take(P, *spelled(B)) * values, "A0": A0.view(A), "B0": B0,
        }  # fmt: skip

    def write(self, place: Place) -> tuple[float | None, dict[str, Tensor]]:
        operator, site = place.operator, place.site
        if math.prod(site.kernel) != 1:
            raise ExportError(f"LyCORIS has no T-LoRA for the kernels of {site.path}; exclude it")
        A0, B0 = _start(place, len(operator.A))
        start, own = B0 @ A0, operator.B0 @ operator.A0.flatten(1)
        if (start - own).abs().max() > NEAR * start.abs().max():
            raise ExportError(
                f"T-LoRA starts at the principal part of the base, and {site.path} does not; set alpha to the rank and "
                "iterations=None, and train again"
            )
        ones = [1 for _ in site.kernel]
        values = operator.B.new_ones(1, len(operator.A))
        return operator.scale * len(operator.A), {Q: operator.A, P: operator.B.view(*operator.B.shape, *ones),
                                                  VALUES: values}  # fmt: skip


def _start(place: Place, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the principal part of the host's weight, [rank, in] and [out, rank]."""
    weight = replace(place.site, meta=False).base_weight().detach().flatten(1)
    U, S, V = principal(precise(weight), rank)
    return V, U * S
