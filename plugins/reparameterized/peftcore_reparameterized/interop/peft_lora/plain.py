"""Plain LoRA in peft's files, and the methods that are written as plain LoRA.

EVA and LoRA-One are LoRA after their initialization, and are written as LoRA. A file of EVA has a rank and an alpha for
each module. The updates of CorDA and LoRA-GA are written as LoRA of twice the rank, which is correct on any equal base.
Files of peft cannot contain their initial factors. The update of LoRA-XS is written as LoRA of the same rank. peft
would train its outer factors, which are frozen in peftcore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor

from peftcore.author.formats import Keys, Place
from peftcore_reparameterized.interop.peft_lora.variant import LoRAVariant


class PlainVariant(LoRAVariant):
    """LoRA, for every file that no other variant marks."""

    reads = "lora"
    writes = ("lora", "lora_plus", "eva", "lora_one")
    has_bias = True

    def marked(self, keys: Keys) -> bool:
        return True

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        return {**common, "across_groups": _in_groups(shapes)}


class UpdateVariant(LoRAVariant):
    """A variant whose file contains the factors of the whole update, at the rank that its options specify."""

    def factors(self, place: Place) -> tuple[Tensor, Tensor]:
        """Returns the factors [*batch, rank, in, *kernel] and [*batch, out, rank]. If the weight has fewer directions,
        the others are zeros."""
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
    """Whether the tensors are those of a grouped convolution, in which each output uses only a part of the rank."""
    A, B = shapes.get("lora_A.weight", Size()), shapes.get("lora_B.weight", Size())
    return len(A) == len(B) > 2 and A[0] != B[1]
