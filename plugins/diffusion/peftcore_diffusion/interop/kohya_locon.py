"""LoCon in files of kohya's sd-scripts and of LyCORIS (checked against LyCORIS 4.1).

``lora_down``, ``lora_mid`` and ``lora_up`` are our down, core and up; a file without ``lora_mid`` is read as LoRA. The
scale is alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor

from peftcore.author.formats import Found, Held, KohyaMethod, Place, spelled

DOWN, CORE, UP = "lora_down.weight", "lora_mid.weight", "lora_up.weight"


class KohyaLoCon(KohyaMethod):
    """Translates low-rank factors, and the cores of kernels larger than 1x1."""

    methods = ("locon",)
    below = (DOWN, CORE, UP)
    telling = below
    rows = (UP,)
    factors = (DOWN, UP)

    def options(self, held: Held) -> dict[str, Any]:
        rank = held.size(DOWN, 0)
        alpha = held.alpha(rank)
        if math.prod(held.weight[2:]) == 1:
            return {"rank": rank, "alpha": alpha}
        return {"conv_rank": rank, "conv_alpha": alpha, "use_tucker": CORE in held.shapes}

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        return next(iter(shapes.get(UP, ())), -1)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        shapes = {name: value.shape for name, value in place.operator.state_dict().items()}
        tensors = {"down": found.take(DOWN, *spelled(shapes["down"])), "up": found.take(UP, *spelled(shapes["up"]))}
        return tensors | ({"core": found.take(CORE, shapes["core"])} if "core" in shapes else {})

    def write(self, place: Place) -> tuple[float, dict[str, Tensor]]:
        down, core, up = place.operator.down, place.operator.core, place.operator.up
        ones = [1 for _ in place.site.kernel]
        tensors = {DOWN: down if core is None else down.view(*down.shape, *ones), UP: up.view(*up.shape, *ones)}
        return place.operator.scale * len(down), tensors | ({} if core is None else {CORE: core})
