"""QLoRA: low-rank adapters on a 4-bit base.   Dettmers et al. 2023, arXiv 2305.14314 (artidoro/qlora).

Equation:
    y = Q x + b + s B A dropout(x),   s = alpha / rank,   Q = nf4(W): 16 levels, blocks of 64, A and B as in LoRA

The method is meant for a quantized model. Quantize the model by ``peftcore.quantize(model, "nf4", double_quant=True)``
(or "bnb-nf4", …) before or after `apply`, or load it with transformers' `BitsAndBytesConfig`. On a dense model every
forward rounds the weights, so that outputs equal those of the quantized model. A model that is quantized already is not
changed, and `scheme` is ignored. For paged optimizer states, select an optimizer that has them:
``injection.optimizer(bnb.optim.PagedAdamW32bit, …)``.

A merge writes Q + s B A. With into="same" this sum is rounded again, which may lose more than the adapter gains. The
report of the merge contains the loss. Merge into floating point instead, or keep the adapter unmerged.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Start: A and B as in LoRA: an identity on a model that is quantized already; a dense model is rounded.

Differs from the authors' code: The authors' code was not compared; outputs and the rounding were compared with peft and
bitsandbytes. No difference is known.

Use it: `peftcore.apply(model, "qlora")`, where memory is too small to train on the model in 16 bits.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt
from torch import nn

from peftcore.author import LearningRate, Method, Share, Site, Surgeon, Tags
from peftcore_quantized._lora_on_packed import LoRAConfig, LoRAOnPacked
from peftcore_quantized._packed_base import place, update_count


class QLoRAConfig(LoRAConfig):
    """Options of QLoRA."""

    method: Literal["qlora"] = "qlora"
    rank: PositiveInt = 64
    """Rank of the update."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training (the paper: 0.1, or 0.05 for large models).
    Requires a base that is quantized already."""
    scheme_options: dict[str, Any] = Field(default_factory=lambda: {"double_quant": True})
    """Options of the scheme. By default the scales are stored in 8 bits too."""


class QLoRA(Method):
    """Low-rank adapters on a 4-bit base."""

    name = "qlora"
    Config = QLoRAConfig
    tags = Tags(category="quantized", paper="2305.14314", mergeable=True, identity_at_init=False)
    learning_rate = LearningRate(
        2e-4, "artidoro/qlora@7f4e95a, scripts/finetune_guanaco_7b.sh", on="LLaMA-7B, OpenAssistant"
    )
    target = ("all-linear",)
    alternatives = ("all-layers",)

    def inject(self, model: nn.Module, config: QLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(place(site), LoRAOnPacked, config)

    @staticmethod
    def parameter_count(site: Site, config: QLoRAConfig) -> int:
        return update_count(site, config.rank)
