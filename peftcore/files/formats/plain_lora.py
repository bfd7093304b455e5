"""Converts an adapter to low-rank updates of matrices, for programs that read only plain LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peftcore.errors import ExportError
from peftcore.files.formats.peft_module_names import PREFIXES
from peftcore.files.formats.peft_writing import module_key, written
from peftcore.files.formats.translated_operators import places_of
from peftcore.injection.injection import Injection

FACTORS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class LowRankPair:
    """The update of one module, B A; its scale is multiplied into B."""

    A: Tensor
    """``[rank, in]``."""
    B: Tensor
    """``[out, rank]``."""

    def filled(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns A and B padded to a rank that is at least as large. B is padded with zeros, so the product is the
        same. A is padded with initial values of LoRA, drawn from a fixed seed, so that all ranks can be trained
        further."""
        bound = 1 / math.sqrt(self.A.shape[1])
        drawn = torch.rand(rank, self.A.shape[1], generator=torch.Generator().manual_seed(0))
        A, B = bound * (2 * drawn - 1).to(self.A), self.B.new_zeros(self.B.shape[0], rank)
        A[: len(self.A)], B[:, : len(self.A)] = self.A, self.B
        return A, B


@torch.no_grad()
def plain_lora(injection: Injection, program: str) -> dict[str, LowRankPair]:
    """Returns the update of each module that an adapter changes, keyed by the module's path.

    Args:
        program: the program that reads only LoRA, for messages.

    Raises:
        ExportError: the adapter is not a plain LoRA, adapts a convolution, or has other trained tensors.
    """
    options, tensors = written(injection)
    beside = [name for name in tensors if not name.endswith(FACTORS)]
    if options["peft_type"] != "LORA" or options.get("use_dora") or beside:
        what = f"{min(beside)} is another tensor" if beside else f"{injection.method.name} is another method"
        raise ExportError(
            f"{program} reads only low-rank factors of matrices, and {what}: convert it with peftcore.to_lora"
        )
    pairs = {}
    for place in places_of(injection):
        path, factors = module_key(place.site), place.operator.factors()
        if factors is None or factors[0].dim() != 2 or f"{PREFIXES[0]}{path}{FACTORS[0]}" not in tensors:
            raise ExportError(f"{program} reads only low-rank factors of matrices, and {path} has other ones")
        A, B, scale = factors
        pairs[path] = LowRankPair(A.detach().float(), scale * B.detach().float())
    return pairs
