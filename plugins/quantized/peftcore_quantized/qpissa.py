"""QPiSSA: the principal part trains, the rest is quantized.   Meng et al. 2024, arXiv 2404.02948 (GraphPKU/PiSSA).

Equation:
    s B1 A1 = the best of the rank for W,   s B_t A_t = the best of the rank for W - Q_{t-1},   t = 2 .. iterations
    y = Q x + b + s B A x,   Q_t = round(W - s B_t A_t),   A and B start at the last A_t and B_t,   s = alpha / rank

The residual, W without its principal part, is smaller and closer to normal, so quantizing it loses less than quantizing
W. Each factor contains the roots of the singular values, divided by the root of s. So the whole principal part trains,
for any alpha.

If ``peftcore.quantize(model, scheme)`` is called after `apply`, it stores Q. Until then, every forward computes Q from
the dense weight. A0 and B0, the initial values of A and B, are frozen buffers and are saved in the file, so the adapter
fits the original dense base. Directions beyond the weight's rank are zero. The method has no dropout, because it would
remove parts of the base's output.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Start: A and B at the last A_t and B_t: outputs are close to those of W, not equal. On a model that is quantized before
the method is installed, it starts as PiSSA does: y = Q x + b + s (B A - B0 A0) x, where B0 A0 is the principal part of
Q, so outputs are unchanged.

Differs from the authors' code: The authors and peft write the residual into the base; here it is computed in every
forward until the model is quantized. The authors have alpha = rank. peft refuses a model that is quantized already.

Use it: `peftcore.apply(model, "qpissa")`, instead of QLoRA where the dense model can be loaded once, and training is
short.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import nn

from peftcore.author import LearningRate, Method, Site, Surgeon, Tags
from peftcore_quantized._low_rank_first import LowRankFirstConfig, LowRankFirstOperator
from peftcore_quantized._packed_base import Factors, place, update_count


class QPiSSAConfig(LowRankFirstConfig):
    """Options of QPiSSA."""

    method: Literal["qpissa"] = "qpissa"
    rank: PositiveInt = 16
    """Number of singular values that are adapted (the authors: 128)."""
    iterations: Annotated[PositiveInt, Field(le=1000)] = 1
    """Number of alternations of decomposition and rounding, on a dense base (the authors: 1, or 5)."""


class QPiSSAOperator(LowRankFirstOperator):
    """The trained principal part of one weight, and its frozen initial value."""

    @staticmethod
    def chosen(turns: Iterator[tuple[Factors, float]]) -> Factors:
        *_, (last, _) = turns
        return last


class QPiSSA(Method):
    """The principal part of a weight trains; the rest is quantized."""

    name = "qpissa"
    Config = QPiSSAConfig
    tags = Tags(category="quantized", paper="2404.02948", mergeable=True, identity_at_init=False)
    learning_rate = LearningRate(
        2e-5, "GraphPKU/PiSSA@87f4db6, scripts/metamath_llama2_7b/run_qpissa.sh", on="Llama-2-7B, MetaMathQA"
    )
    target = ("all-linear",)
    alternatives = ("all-layers",)

    def inject(self, model: nn.Module, config: QPiSSAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(place(site), QPiSSAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: QPiSSAConfig) -> int:
        return update_count(site, config.rank)
