"""MiCA in peft's files: the value ``"mica"`` of `init_lora_weights`. B contains the minor directions of the weight.

peft supports MiCA in some kinds of layers, and with one rank for all. An adapter with other layers or several ranks is
written as plain LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftcore.author import Transposed
from peftcore.author.formats import Keys, Place, is_one_of, is_parameter
from peftcore_reparameterized.interop.peft_lora.plain import UpdateVariant

LAYERS = (nn.Linear, Transposed, nn.Embedding)
"""The layers for which peft supports MiCA."""


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
    """Whether peft supports MiCA at a place, and the factors have the configured rank."""
    layer = not is_parameter(place.site) and is_one_of(place.site, LAYERS)
    return layer and place.operator.A.shape[0] == place.config.rank
