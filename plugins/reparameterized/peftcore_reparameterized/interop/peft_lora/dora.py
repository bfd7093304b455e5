"""DoRA in peft's files: the option `use_dora`, and the magnitude of each output in addition to A and B.

``lora_magnitude_vector`` is peftcore's magnitude. In some files its name ends with ``.weight``. In a convolution its
shape is [1, out, 1, ...].
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from peftcore.author.formats import Found, Keys, Place
from peftcore_reparameterized.interop.peft_lora.variant import LoRAVariant

MAGNITUDE = "lora_magnitude_vector"


class DoRAVariant(LoRAVariant):
    """Low-rank factors of the direction, and a magnitude."""

    reads = "dora"
    writes: ClassVar[tuple[str, ...]] = ("dora",)
    below = (MAGNITUDE, f"{MAGNITUDE}.weight")
    starts = (*LoRAVariant.starts, "mica")
    has_scaling = False

    def marked(self, keys: Keys) -> bool:
        return bool(keys.take("use_dora", bool, False))

    def read(self, place: Place, found: Found, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = MAGNITUDE if found.has(MAGNITUDE) else f"{MAGNITUDE}.weight"
        size, ones = place.operator.magnitude.shape, [1 for _ in place.site.kernel]
        return {**factors, "magnitude": found.take(name, size, (1, *size, *ones), (*size, 1), (1, *size))}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"use_dora": True}

    def write(self, place: Place) -> dict[str, Tensor]:
        magnitude, ones = place.operator.magnitude, [1 for _ in place.site.kernel]
        return {MAGNITUDE: magnitude.view(1, *magnitude.shape, *ones) if ones else magnitude}
