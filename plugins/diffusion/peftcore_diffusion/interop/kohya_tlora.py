"""T-LoRA written into files of kohya's sd-scripts and of LyCORIS (checked against LyCORIS 4.1).

The files do not store a rank for each timestep. A program that reads a file applies all ranks, as peftcore does at
timestep 0, or masks them by the timestep of its sampler. If an update starts from the principal part of the base
weight, it is written as T-LoRA of LyCORIS, which computes that start from the base weight again. Any other update is
written as a LoRA, of twice the rank if start values are subtracted. This module only writes files: T-LoRA files are
loaded as the method `pissa`, by the plugin of that method.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor

from peftcore.author.formats import Found, Held, KohyaMethod, Place

Q, P, VALUES = "q_layer.weight", "p_layer.weight", "lambda_layer"
DOWN, UP = "lora_down.weight", "lora_up.weight"
NEAR = 1e-4
"""Tolerance for a start that equals the principal part of the base, relative to the part's largest entry."""


class KohyaMaskedTLoRA(KohyaMethod):
    """Writes updates of T-LoRA, without their masks of ranks."""

    methods = ("tlora",)
    below = (Q, P, VALUES, DOWN, UP)
    telling = ()
    rows = (UP,)
    factors = (DOWN, UP)

    def reads(self, shapes: Mapping[str, Size]) -> bool:
        return False

    def options(self, held: Held) -> dict[str, Any]:
        return {}

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        return -1

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {}

    def write(self, place: Place) -> tuple[float, dict[str, Tensor]]:
        operator, ones = place.operator, [1 for _ in place.site.kernel]
        if operator.min_rank < operator.rank and place.index == 0:
            warnings.warn(
                "files of kohya and LyCORIS do not store a rank for each timestep: other programs use all ranks at "
                "each timestep, as peftcore does at timestep 0, unless their sampler masks them",
                UserWarning,
                stacklevel=2,
            )
        if _starts_at_the_principal_part(place):
            up, values = operator.B.view(*operator.B.shape, *ones), operator.values[None]
            return operator.scale * len(operator.A), {Q: operator.A, P: up, VALUES: values}
        pairs = operator.pairs()
        A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], -1)
        return operator.scale * len(A), {DOWN: A, UP: B.view(*B.shape, *ones)}


def _starts_at_the_principal_part(place: Place) -> bool:
    """Return True if the start values that are subtracted are the principal part of the host's weight."""
    operator = place.operator
    if operator.A0 is None or place.config.start != "weight" or math.prod(place.site.kernel) != 1:
        return False
    weight = replace(place.site, meta=False).base_weight().detach().flatten(1)
    U, S, V = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    rank = len(operator.A)
    start = U[:, :rank] * S[:rank] @ V[:rank]
    own = operator.B0 * operator.values0 @ operator.A0.flatten(1)
    return bool((start - own).abs().max() <= NEAR * start.abs().max())
