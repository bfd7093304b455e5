"""LQ-LoRA: a weight as low-rank plus quantized.   Guo et al. 2023, arXiv 2311.12023 (HanGuo97/lq-lora).

Equation:
    s B_t A_t = the best of the rank for W - Q_{t-1},   Q_t = round(W - s B_t A_t),   t = 1 .. iterations,   Q_0 = 0
    y = Q_t x + b + s B A x,   A and B start at A_t and B_t of the t whose Q_t + s B_t A_t comes closest to W

The iteration stops as soon as the distance no longer decreases, and the iterate before that is used. QPiSSA also starts
with the low-rank step, but uses the last iterate. LoftQ starts with the rounding. Both factors are divided by the root
of s = alpha / rank. Singular vectors are exact, and the same on every machine.

If ``peftcore.quantize(model, scheme)`` is called after `apply`, it stores Q. Until then, every forward computes Q from
the dense weight. A0 and B0, the initial values of A and B, are frozen buffers and are saved in the file. The method has
no dropout, as in the authors' runs, because dropout would remove parts of the base's output. ``overrides`` can select
another format for some sites: ``{"*.down_proj": {"scheme": "int8"}}``.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Start: A and B at A_t and B_t: outputs are close to those of W, not equal. On a model that is quantized before the
method is installed, W is unknown: the method then starts as QPiSSA does, with the principal part of Q, and outputs are
unchanged.

Differs from the authors' code: The authors' code stops at the same iteration, but returns the worse iterate, as a
comment in that code notes. The authors compute singular vectors by a randomized algorithm. Two parts of the paper are
not implemented: the distance weighted by Fisher information, which needs data, and the integer programme that chooses a
format for each matrix under a budget of bits.

Use it: `peftcore.apply(model, "lq_lora")`, instead of QLoRA at 4 bits and below, where the dense model can be loaded
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import nn

from peftcore.author import LearningRate, Method, Site, Surgeon, Tags
from peftcore_quantized._low_rank_first import LowRankFirstConfig, LowRankFirstOperator
from peftcore_quantized._packed_base import Factors, place, update_count


class LQLoRAConfig(LowRankFirstConfig):
    """Options of LQ-LoRA."""

    method: Literal["lq_lora"] = "lq_lora"
    rank: PositiveInt = 64
    """Rank of the update."""
    iterations: Annotated[PositiveInt, Field(le=1000)] = 10
    """Maximum number of alternations of decomposition and rounding, on a dense base. The authors use 100, with a
    faster, approximate decomposition. The first few iterations give most of the gain."""


class LQLoRAOperator(LowRankFirstOperator):
    """The trained low-rank part of one weight, and its frozen initial value."""

    @staticmethod
    def chosen(turns: Iterator[tuple[Factors, float]]) -> Factors:
        best, least = None, float("inf")
        for found, distance in turns:
            if distance >= least:
                break
            best, least = found, distance
        assert best is not None, "there is one iteration or more"
        return best


class LQLoRA(Method):
    """A weight as low-rank plus quantized; the low-rank part trains."""

    name = "lq_lora"
    Config = LQLoRAConfig
    tags = Tags(category="quantized", paper="2311.12023", mergeable=True, identity_at_init=False)
    learning_rate = LearningRate(
        2e-4, "HanGuo97/lq-lora@c2424b3, scripts/oasst1_lora.sh", on="Llama-2-7B, OpenAssistant"
    )
    target = ("all-linear",)
    alternatives = ("all-layers",)

    def inject(self, model: nn.Module, config: LQLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(place(site), LQLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: LQLoRAConfig) -> int:
        return update_count(site, config.rank)
