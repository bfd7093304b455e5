"""(IA)^3 in files of LyCORIS (checked against LyCORIS 4.1).

``weight`` is our gain minus one, and ``on_input`` is True for gains of inputs. In LyCORIS gains of outputs scale only
the weight; in peftcore they scale the bias too. So both are equal only for modules without a bias. For modules with a
bias, the gains of LyCORIS equal `glora` with a vector A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor

from peftcore.author.formats import Found, Held, KohyaMethod, Place
from peftcore.errors import ExportError

GAIN, ON_INPUT = "weight", "on_input"


class KohyaIA3(KohyaMethod):
    """Translates gains of a module's outputs, or of its inputs."""

    methods = ("ia3",)
    below = (GAIN, ON_INPUT)
    telling = (ON_INPUT,)

    def fits(self, held: Held) -> bool:
        return super().fits(held) and bool(held.numbers.get(ON_INPUT) or not held.bias)

    def options(self, held: Held) -> dict[str, Any]:
        return {"scale_inputs": ["*"] if held.numbers.get(ON_INPUT) else []}

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        return -1

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        found.take(ON_INPUT, (), (1,))
        gain, ones = place.operator.gain.shape, (1,) * len(place.site.kernel)
        return {"gain": 1 + found.take(GAIN, (1, *gain, *ones) if ones else gain).reshape(gain)}

    def write(self, place: Place) -> tuple[float | None, dict[str, Tensor]]:
        site, operator, ones = place.site, place.operator, (1,) * len(place.site.kernel)
        if not operator.on_input and site.layer.has(site.module, "bias"):
            raise ExportError(
                f"LyCORIS scales only the weight, but ia3 also scales the bias of {site.path}; exclude it, or train "
                "glora with A='vector' and B, C, D, E='none' there"
            )
        if operator.on_input and len(operator.gain) != site.in_features:
            raise ExportError(
                f"LyCORIS cannot scale the inputs of a grouped convolution such as {site.path}; exclude it"
            )
        gain = operator.gain - 1
        told = torch.tensor(int(operator.on_input))
        return None, {GAIN: gain.view(1, -1, *ones) if ones else gain, ON_INPUT: told}
