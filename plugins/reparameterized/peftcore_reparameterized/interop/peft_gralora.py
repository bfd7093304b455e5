"""GraLoRA in peft's files (checked against peft 0.21).

``gralora_A`` [k, in / k, rank] and ``gralora_B`` [k, rank, out / k] are peftcore's A and B with their last two
dimensions exchanged. The names of the LoRA in parallel contain ``_general``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place

HYBRID = {"hybrid_A": "gralora_A_general.weight", "hybrid_B": "gralora_B_general.weight"}


class PeftGraLoRA(PeftMethod):
    """Translates low-rank blocks."""

    methods = ("gralora",)
    below = ("gralora_A", "gralora_B", *HYBRID.values())
    bias = "gralora_only"
    kinds = (nn.Linear, Transposed)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "hybrid_r": "use hybrid_rank=",
        "gralora_k": "use blocks=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        return {
            "method": "gralora",
            "rank": keys.take("r", int, 32),
            "hybrid_rank": keys.take("hybrid_r", int, 0),
            "alpha": float(keys.take("alpha", float, 64)),
            "blocks": keys.take("gralora_k", int, 2),
            "dropout": float(keys.take("gralora_dropout", float, 0.0)),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        operator = place.operator
        blocks = {each: found.take(f"gralora_{each}", operator.get_tensor(each).mT.shape).mT for each in "AB"}
        if not operator.hybrid:
            return blocks
        return blocks | {name: found.take(theirs, operator.get_tensor(name).shape) for name, theirs in HYBRID.items()}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "r": config.rank,
            "hybrid_r": config.hybrid_rank,
            "alpha": config.alpha,
            "gralora_k": config.blocks,
            "gralora_dropout": config.dropout,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        operator = place.operator
        blocks = {f"gralora_{each}": operator.get_tensor(each).mT.contiguous() for each in "AB"}
        return blocks | {theirs: operator.get_tensor(name) for name, theirs in HYBRID.items() if operator.hybrid}
