"""QA-LoRA: low-rank adapters that merge into the zeros of codes.   Xu et al. 2023, arXiv 2309.14717
(yuhuixu1993/qa-lora).

Equation:
    y = Q x + b + s B A dropout(mean(x)),   mean(x)[g] the mean over group g of inputs,   s = alpha / rank
    dW[o, i] = s / `group_size` (B A)[o, group of i]

The update adds one number for each output and group of inputs. If a format stores a group as ``scale * (code - zero)``,
the update changes only the zero. Then a merge with into="same" keeps codes and scales, and is exact up to rounding.
This holds for the scheme "int4", and for any scheme with floating-point zeros whose group size divides `group_size`. It
does not hold for formats without zeros (nf4, int8).

The update uses the mean of a group; the paper's algorithm uses the sum. Multiply alpha by group_size to get the sum. In
a convolution, each position of the kernel counts as a separate input, as in the quantizer.

Parameters: rank * (in * kernel / group_size + out) a site, times the number of experts.

Start: A is Xavier-uniform as in the authors' code, and B is zero: an identity on a model that is quantized already; a
dense model is rounded.

Differs from the authors' code: No difference is known: the authors' code and its merge use the mean too. peft
multiplies the mean by the number of groups instead of by their size, so its update is ``in / group_size`` times this
one; peft does not implement a merge of this update, and starts A as Kaiming.

Use it: `peftcore.apply(model, "qa_lora")`, where the merged model must be in 4 bits. It has fewer parameters than QLoRA
of the same rank.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, Site, Surgeon, Tags
from peftcore_quantized._lora_on_packed import LoRAConfig, LoRAOnPacked
from peftcore_quantized._packed_base import Factors, group_count, place


class QALoRAConfig(LoRAConfig):
    """Options of QA-LoRA."""

    method: Literal["qa_lora"] = "qa_lora"
    rank: PositiveInt = 64
    """Rank of the update."""
    scheme: str = "int4"
    """The scheme that quantizes the base, as in ``peftcore.quantize(model, scheme)``. A base that is quantized already
    is not changed."""
    group_size: PositiveInt = 32
    """Number of inputs that share an update; it divides the number of inputs. The merge is exact only if it is a
    multiple of the scheme's group size, which is a separate option."""


class QALoRAOperator(LoRAOnPacked):
    """The update of one site: A ``[*batch, rank, groups]``, B ``[*batch, out, rank]``."""

    def __init__(self, site: Site, config: QALoRAConfig) -> None:
        groups = group_count(site, config.group_size)
        bound = math.sqrt(6 / (groups + config.rank))
        A = nn.init.uniform_(torch.empty(*site.batch, config.rank, groups), -bound, bound)
        super().__init__(site, config, Factors(A, torch.zeros(*site.batch, site.out_features, config.rank)))
        self.group_size = config.group_size

    def product(self, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
        shared = (self.scale / self.group_size) * (B @ A)  # [*batch, out, groups]
        return shared.repeat_interleave(self.group_size, -1).view(weight.shape)

    def seen(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.group_size)).mean(-1)  # [..., groups]


class QALoRA(Method):
    """Low-rank adapters that merge into the zeros of codes."""

    name = "qa_lora"
    Config = QALoRAConfig
    tags = Tags(category="quantized", paper="2309.14717", mergeable=True, identity_at_init=False)
    learning_rate = LearningRate(2e-4, "yuhuixu1993/qa-lora@91604c7, qalora.py", on="LLaMA-7B, Alpaca")
    target = ("all-linear",)
    alternatives = ("all-layers",)

    def inject(self, model: nn.Module, config: QALoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(place(site), QALoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: QALoRAConfig) -> int:
        return math.prod(site.batch) * config.rank * (group_count(site, config.group_size) + site.out_features)
