"""LoftQ: quantization and low-rank adapters that start together.   Li et al. 2023, arXiv 2310.08659 (yxli2123/LoftQ).

Equation:
    Q_t = round(W - B_{t-1} A_{t-1}),   B_t A_t = the best of the rank for W - Q_t,   t = 1 .. iterations,   B_0 A_0 = 0
    y = Q_t x + b + B A x,   A and B start at A_t and B_t of the t whose Q_t + B_t A_t comes closest to W

If ``peftcore.quantize(model, scheme)`` is called after `apply`, it stores Q_t. Until then, every forward computes Q_t
from the dense weight. With one iteration, Q_t is round(W), so the adapter also fits a model that another library
quantized.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Start: A and B at A_t and B_t: outputs are close to those of W, not equal. On a model that is quantized before the
method is installed, the original weight is lost and cannot be reconstructed: there A and B start as in LoRA.

Differs from the authors' code: The distance to W may grow from one iteration to the next. The authors' code and peft
use the last iteration; this method uses the best one. The scale is 1 here. The authors and peft have the scale alpha /
rank, but compute the factors without it, which is correct only if it is 1.

Use it: `peftcore.apply(model, "loftq")`, instead of QLoRA at 4 bits and below, where the dense model can be loaded
once.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, Site, Surgeon, Tags, full_precision
from peftcore_quantized._packed_base import (
    Factors,
    PackedBaseOperator,
    PackedConfig,
    as_factors,
    lora_start,
    original,
    place,
    principal,
    round_weight,
    update_count,
)


class LoftQConfig(PackedConfig):
    """Options of LoftQ."""

    method: Literal["loftq"] = "loftq"
    rank: PositiveInt = 16
    """Rank of the update."""
    iterations: Annotated[PositiveInt, Field(le=1000)] = 5
    """Number of alternations of rounding and decomposition (the authors: 5; peft: 1)."""


def alternate(weight: Tensor, rank: int, rounding: str, iterations: int) -> tuple[Factors, Factors | None]:
    """Return the best of the iterates for a weight ``[*batch, out, in]``: the factors, and the factors whose product
    was subtracted before the rounding (None in the first iteration)."""
    taken: Factors | None = None
    best: tuple[Factors, Factors | None] | None = None
    least = float("inf")
    for _ in range(iterations):
        rest = weight if taken is None else weight - taken.B @ taken.A
        gap = weight - round_weight(rounding, rest, weight.dim() - 2)
        found = principal(gap, rank)
        distance = float((gap - found.B @ found.A).norm()) if not weight.is_meta else 0.0
        if distance < least:
            best, least = (found, taken), distance
        taken = found
    assert best is not None, "there is one iteration or more"
    return best


class LoftQOperator(PackedBaseOperator):
    """The update of one site, which starts as an approximation of the rounding error."""

    def __init__(self, site: Site, config: LoftQConfig) -> None:
        if site.layer.packed:
            found: Factors = lora_start(site, config.rank)
            taken: Factors | None = None
        else:
            weight = original(site)
            with torch.no_grad(), full_precision(weight):
                found, taken = alternate(weight, config.rank, config.rounding(), config.iterations)
            found, taken = as_factors(site, *found), None if taken is None else as_factors(site, *taken)
        if config.iterations > 1 and taken is None:  # one shape of files, whichever iterate was best
            taken = Factors(*(torch.zeros_like(each) for each in found))
        super().__init__(site, config, found, taken)


class LoftQ(Method):
    """Quantization and low-rank adapters that start together."""

    name = "loftq"
    Config = LoftQConfig
    tags = Tags(category="quantized", paper="2310.08659", mergeable=True, identity_at_init=False)
    learning_rate = LearningRate(3e-4, "yxli2123/LoftQ@ae33fd4, scripts/train_gsm8k.sh", on="Llama-2-7B, GSM8K")
    target = ("all-linear",)
    alternatives = ("all-layers",)

    def inject(self, model: nn.Module, config: LoftQConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(place(site), LoftQOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: LoftQConfig) -> int:
        return update_count(site, config.rank)
