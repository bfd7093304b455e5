"""(IA)^3 on the outputs of layers with a bias, in files of LyCORIS (checked against LyCORIS 4.1): it is read as GLoRA
with only a vector A.

The file's ``weight`` scales the layer's weight by 1 + ``weight`` and leaves its bias unchanged, as GLoRA's A does. For
layers without a bias, the file is read as peftcore's (IA)^3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor

from peftcore.author.formats import Found, Held, KohyaMethod, Place

GAIN, ON_INPUT = "weight", "on_input"
ALONE = {"A": "vector", "B": "none", "C": "none", "D": "none", "E": "none"}


class KohyaGains(KohyaMethod):
    """Translates gains on the outputs of a weight."""

    methods = ("glora",)
    below = (GAIN, ON_INPUT)
    telling = (ON_INPUT,)

    def fits(self, held: Held) -> bool:
        return super().fits(held) and held.bias and not held.numbers.get(ON_INPUT)

    def options(self, held: Held) -> dict[str, Any]:
        return dict(ALONE)

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        return -1

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        found.take(ON_INPUT, (), (1,))
        outputs, ones = place.site.out_features, (1,) * len(place.site.kernel)
        return {"A": found.take(GAIN, (1, outputs, *ones) if ones else (outputs,)).reshape(outputs, 1)}

    def writes(self, place: Place) -> bool:
        return all(getattr(place.config, term) == kind for term, kind in ALONE.items())

    def write(self, place: Place) -> tuple[float | None, dict[str, Tensor]]:
        gain, ones = place.operator.A.flatten(), (1,) * len(place.site.kernel)
        return None, {GAIN: gain.view(1, -1, *ones) if ones else gain, ON_INPUT: torch.tensor(0)}
