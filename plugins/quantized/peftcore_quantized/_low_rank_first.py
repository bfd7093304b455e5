"""Base operator and options of QPiSSA and LQ-LoRA, which subtract a low-rank part from a weight before they round the
rest."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from peftcore.author import Site
from peftcore_quantized._packed_base import (
    Factors,
    PackedBaseOperator,
    PackedConfig,
    as_factors,
    original,
    principal,
    round_weight,
)


def low_rank_first(weight: Tensor, rank: int, rounding: str) -> Iterator[tuple[Factors, float]]:
    """Yield the iterates of an endless alternation. Each step sets ``B A`` to the best approximation of W - Q at the
    given rank, and then Q to round(W - B A). Q is zero at first.

    An iterate consists of the factors and of the distance between Q + B A and the weight ``[*batch, out, in]``. The
    distance is zero while planning."""
    gap = weight
    while True:
        found = principal(gap, rank)
        product = found.B @ found.A
        gap = weight - round_weight(rounding, weight - product, weight.dim() - 2)
        yield found, 0.0 if weight.is_meta else float((gap - product).norm())


class LowRankFirstConfig(PackedConfig):
    """The options of methods that subtract a low-rank part from the weight before rounding."""

    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    iterations: Annotated[PositiveInt, Field(le=1000)] = 1
    """Maximum number of alternations of decomposition and rounding, on a dense base."""


class LowRankFirstOperator(PackedBaseOperator):
    """The trained low-rank part of one weight, and its frozen initial value. For a weight that is quantized already,
    the initial value is the principal part of that weight, and outputs are unchanged at first."""

    def __init__(self, site: Site, config: LowRankFirstConfig) -> None:
        scale = config.alpha / config.rank
        with torch.no_grad():
            weight = original(site)
            if site.layer.packed:
                found = principal(weight, config.rank)
            else:
                found = self.chosen(islice(low_rank_first(weight, config.rank, config.rounding()), config.iterations))
            taken = as_factors(site, *found, scale)
        super().__init__(site, config, taken, taken, scale)

    @staticmethod
    def chosen(turns: Iterator[tuple[Factors, float]]) -> Factors:
        """Return the factors at which training starts, chosen from the iterates of `low_rank_first`."""
        raise NotImplementedError
