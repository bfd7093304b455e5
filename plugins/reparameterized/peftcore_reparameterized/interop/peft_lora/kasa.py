"""KaSA in peft's files: the option `kasa_config`, and a diagonal between A and B.

When peft loads such a file, it removes the smallest singular values from W, and so does peftcore. peftcore writes plain
LoRA of twice the rank, which is correct on the same base. ``lora_diag`` is peftcore's d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, Place
from peftcore_reparameterized.interop.peft_lora.decomposed import DecomposedVariant

DIAGONAL = "lora_diag"


class KaSAVariant(DecomposedVariant):
    """Low-rank factors with trained singular values, which replace the base's smallest ones."""

    reads = "kasa"
    writes = ("kasa",)
    below = (DIAGONAL,)
    layers = (nn.Linear,)

    def marked(self, keys: Keys) -> bool:
        return keys.take("kasa_config", dict, None) is not None

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        inside = Keys(keys.table("kasa_config"), keys.where)
        own = {"beta": float(inside.take("beta", float, 1e-4)), "gamma": float(inside.take("gamma", float, 1e-3))}
        inside.check_known()
        return {**common, **own}

    def read(self, place: Place, found: Found, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**factors, "d": found.take(DIAGONAL, place.operator.d.shape)}
