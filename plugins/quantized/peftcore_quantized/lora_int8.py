"""LoRA on an 8-bit base.   Dettmers et al. 2022, arXiv 2208.07339 (LLM.int8); Hu et al. 2021, arXiv 2106.09685 (LoRA).

Equation:
    y = Q x + b + s B A dropout(x),   s = alpha / rank,   Q = absmax / 127 * codes, one absmax a row, A and B as in LoRA

The method is meant for a quantized model. Quantize the model by ``peftcore.quantize(model, "int8")`` (or "bnb-int8",
"torchao-int8", …) before or after `apply`, or load it with transformers' `BitsAndBytesConfig`. The scheme "bnb-int8" is
LLM.int8 itself. It quantizes the inputs too, except columns with a value above its `threshold`, which it multiplies in
floating point. The other schemes quantize only weights. The inputs of the update are never quantized. On a model that
is still dense, every forward rounds the weights, but not the inputs.

A merge writes Q + s B A. With into="same" this sum is rounded again. At 8 bits most of the trained change is preserved,
and the report of the merge contains the share.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Start: A and B as in LoRA: an identity on a model that is quantized already; a dense model is rounded.

Differs from the authors' code: The authors' library is bitsandbytes, whose rounding is the scheme "bnb-int8"; no
difference is known. peft merges into the same format without a report.

Use it: `peftcore.apply(model, "lora_int8")`, where memory is too small to train on the model in 16 bits, but sufficient
with the model in 8 bits.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from peftcore.author import MATRICES, LearningRate, Method, Site, Surgeon, Tags
from peftcore_quantized._lora_on_packed import LoRAConfig, LoRAOnPacked
from peftcore_quantized._packed_base import place, update_count


class LoRAInt8Config(LoRAConfig):
    """Options of LoRA on an 8-bit base."""

    method: Literal["lora_int8"] = "lora_int8"
    scheme: str = "int8"
    """The scheme that quantizes the base, as in ``peftcore.quantize(model, scheme)``. A base that is quantized already
    is not changed."""


class LoRAInt8(Method):
    """LoRA on an 8-bit base."""

    name = "lora_int8"
    Config = LoRAInt8Config
    tags = Tags(category="quantized", paper="2208.07339", mergeable=True, identity_at_init=False)
    learning_rate = LearningRate(
        2e-4,
        "huggingface/peft@5d602fd, examples/int8_training/Finetune_opt_bnb_peft.ipynb",
        on="OPT-6.7B, English quotes",
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: LoRAInt8Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(place(site), LoRAOnPacked, config)

    @staticmethod
    def parameter_count(site: Site, config: LoRAInt8Config) -> int:
        return update_count(site, config.rank)
