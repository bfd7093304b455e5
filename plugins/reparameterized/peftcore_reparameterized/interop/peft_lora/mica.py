"""MiCA in peft's files: the value ``"mica"`` of `init_lora_weights`, with B the weight's minor directions.

Peft has it in some layers, and one rank for all; an adapter with other layers or several ranks is written as plain
LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftcore.author import Transposed
from peftcore.author.formats import Keys, Place, is_one_of, is_parameter
from peftcore_reparameterized.interop.peft_lora.plain import UpdateVariant

LAYERS = (nn.Linear, Transposed, nn.Embedding)
"""The layers where peft has it."""


class MiCAVariant(UpdateVariant):
    """Low-rank factors with a frozen B."""

    reads = "mica"
    writes = ("mica",)
    starts = ("mica",)
    has_scaling = False

    def marked(self, keys: Keys) -> bool:
        return bool(keys.take("init_lora_weights", (bool, str), True) == "mica")

    def write_options_of_all(self, places: Sequence[Place]) -> dict[str, Any]:
        return {"init_lora_weights": "mica"} if all(map(_has_minor, places)) else {}


def _has_minor(place: Place) -> bool:
    """Whether peft has MiCA at a place, with the rank that is said."""
    layer = not is_parameter(place.site) and is_one_of(place.site, LAYERS)
    return layer and place.operator.A.shape[0] == place.config.rank
