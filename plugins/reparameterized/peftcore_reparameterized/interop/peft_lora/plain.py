"""Plain LoRA in peft's files, and the methods that are written as one.

EVA and LoRA-One are LoRA once they have started, and written so, EVA with a rank and an alpha of each module.
What CorDA and LoRA-GA add to the base is LoRA of twice the rank, which is right on any base that is the same; no file
of peft's has their start. What LoRA-XS adds is LoRA of its rank, of which peft would train what is frozen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor

from peftcore.author.formats import Keys, Place
from peftcore_reparameterized.interop.peft_lora.variant import LoRAVariant


class PlainVariant(LoRAVariant):
    """LoRA, which every file is that nothing else marks."""

    reads = "lora"
    writes = ("lora", "lora_plus", "eva", "lora_one")
    has_bias = True

    def marked(self, keys: Keys) -> bool:
        return True

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        return {**common, "across_groups": _in_groups(shapes)}


class UpdateVariant(LoRAVariant):
    """A variant of which the file has the factors of what it adds to the weight, at the rank that its options say."""

    def factors(self, place: Place) -> tuple[Tensor, Tensor]:
        """Returns the factors [*batch, rank, in, *kernel] and [*batch, out, rank]: with zeros where the weight has not
        so many directions."""
        A, B, _ = place.operator.factors()
        lacking, dim = self.times * place.config.rank - B.shape[-1], len(place.site.batch)
        more = A.new_zeros(*A.shape[:dim], lacking, *A.shape[dim + 1 :])
        return torch.cat([A, more], dim).detach(), torch.cat([B, B.new_zeros(*B.shape[:-1], lacking)], -1).detach()


class DataStartVariant(UpdateVariant):
    """CorDA and LoRA-GA, whose start is computed from data."""

    writes = ("corda", "lora_ga")
    times = 2


class LoRAXSVariant(UpdateVariant):
    """LoRA-XS, whose outer factors are frozen."""

    writes = ("lora_xs",)


def _in_groups(shapes: Mapping[str, Size]) -> bool:
    """Whether the tensors are those of a grouped convolution: each output mixes some of the rank alone."""
    A, B = shapes.get("lora_A.weight", ()), shapes.get("lora_B.weight", ())
    return len(A) == len(B) > 2 and A[0] != B[1]
