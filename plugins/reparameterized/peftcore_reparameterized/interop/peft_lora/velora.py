"""VeLoRA in peft's files: the option `velora_config`, and a vector in addition to A and B, onto which inputs are
projected.

``lora_velora_embed`` is peftcore's v.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor

from peftcore.author.formats import Found, Keys, Place
from peftcore_reparameterized.interop.peft_lora.variant import LoRAVariant

VECTOR = "lora_velora_embed"
PROJECTIONS = {"batch_average_once": "first", "batch_average": "each", "random": "random"}
"""Names of the projections in peftcore, by their names in peft."""


class VeLoRAVariant(LoRAVariant):
    """Low-rank factors whose inputs are stored in a compressed form for the gradient."""

    reads = "velora"
    writes = ("velora",)
    below = (VECTOR,)
    has_scaling = False

    def marked(self, keys: Keys) -> bool:
        return keys.take("velora_config", dict, None) is not None

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        inside = Keys(keys.table("velora_config"), keys.where)
        inside.only("init_type", *PROJECTIONS)
        own = {
            "num_groups": inside.take("num_groups", int, 64),
            "projection": PROJECTIONS[inside.take("init_type", str, "batch_average")],
            "rebuilt_scale": float(inside.take("scale", float, 1.0)),
        }
        inside.check_known()
        return {**common, **own}

    def read(self, place: Place, found: Found, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**factors, "v": found.take(VECTOR, place.operator.v.shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        kind = next(name for name, own in PROJECTIONS.items() if own == config.projection)
        return {"velora_config": {"num_groups": config.num_groups, "init_type": kind, "scale": config.rebuilt_scale}}

    def write(self, place: Place) -> dict[str, Tensor]:
        return {VECTOR: place.operator.v}
