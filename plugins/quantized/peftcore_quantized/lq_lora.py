"""LQ-LoRA: a weight as low-rank plus quantized.   Guo et al. 2023, arXiv 2311.12023 (HanGuo97/lq-lora).

    s B_t A_t = the best of the rank for W - Q_{t-1},   Q_t = round(W - s B_t A_t),   t = 1 .. iterations,   Q_0 = 0
    y = Q_t x + b + s B A x,   A and B start at A_t and B_t of the t whose Q_t + s B_t A_t comes closest to W

It stops as soon as the distance no longer falls, and takes the iterate before that; the authors' code stops there too,
but returns the one that is worse, as a remark in it says. QPiSSA starts from the low-rank step as well and takes the
last iterate, LoftQ starts from the rounding. s = alpha / rank is taken out of both factors. The authors find singular
vectors by a randomized algorithm, here they are exact, and the same everywhere.

Q is what ``peftcore.quantize(model, scheme)`` packs afterwards; until then it is computed from the dense weight in
every forward. A0 and B0, what A and B started at, stand frozen beside them and are in the file. On a base that is
packed before the method comes there is no W to come close to: it starts as QPiSSA does there, with the principal part
of Q, and nothing changes at first. There is no dropout, as in the authors' runs: it would drop what the base itself
computes.

Left out: the distance weighted by Fisher information, which needs data where the plain method needs none, and the
integer programme that gives each matrix its own format under a budget of bits; ``overrides`` can say that by hand,
``{"*.down_proj": {"scheme": "int8"}}``.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Use it in place of QLoRA at 4 bits and below, where the dense model can be loaded once.
"""

from __future__ import annotations

from itertools import islice
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore import Method, Site, Surgeon, Tags
from peftcore_quantized._packed_base import (
    Factors,
    PackedBaseOperator,
    PackedConfig,
    as_factors,
    low_rank_first,
    original,
    place,
    principal,
    update_count,
)


class Config(PackedConfig):
    """Options of LQ-LoRA."""

    method: Literal["lq_lora"] = "lq_lora"
    rank: PositiveInt = 64
    """Rank of the update."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    iterations: PositiveInt = 10
    """How often decomposition and rounding take turns at most, on a base that is dense (the authors: 100, with a faster
    decomposition that is not exact; what is gained falls off after the first few)."""


def closest(weight: Tensor, rank: int, rounding: str, iterations: int) -> Factors:
    """The factors of the last iterate that is nearer to the weight ``[*batch, out, in]`` than all before."""
    best, least = None, float("inf")
    for found, distance in islice(low_rank_first(weight, rank, rounding), iterations):
        if distance >= least:
            break
        best, least = found, distance
    assert best is not None, "there is one iteration or more"
    return best


class LQLoRAOperator(PackedBaseOperator):
    """The low-rank part of one weight, and what it was."""

    def __init__(self, site: Site, config: Config) -> None:
        scale = config.alpha / config.rank
        with torch.no_grad():
            weight = original(site)
            if site.layer.packed:
                found = principal(weight, config.rank)
            else:
                found = closest(weight, config.rank, config.rounding(), config.iterations)
            taken = as_factors(site, *found, scale)
        super().__init__(site, config, taken, taken, scale)


class LQLoRA(Method):
    """A weight as low-rank plus quantized; the low-rank part trains."""

    name = "lq_lora"
    Config = Config
    tags = Tags(
        category="quantized",
        paper="2311.12023",
        mergeable=True,
        identity_at_init=False,
        checked_against="the authors' code",
    )
    target = ("all-linear",)

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(place(site), LQLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        return update_count(site, config.rank)
