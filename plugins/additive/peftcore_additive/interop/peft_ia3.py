"""(IA)^3 in peft's files (checked against peft 0.21).

``ia3_l`` is our gain: a column [out, 1] for scaled outputs, a row [1, in] for scaled inputs (`feedforward_modules`),
and [1, channels, 1, 1] in convolutions for both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place, matching, module_key
from peftcore.errors import CheckpointError


class PeftIA3(PeftMethod):
    """Translates gains of a module's outputs, or of its inputs."""

    methods = ("ia3",)
    below = ("ia3_l",)
    kinds = (nn.Linear, Transposed, nn.Conv2d, nn.Conv3d)
    advice: ClassVar[Mapping[str, str]] = {
        "feedforward_modules": "use scale_inputs=",
        "init_ia3_weights": "leave it out: a fresh adapter starts as in its paper",
    }

    def changes(self, keys: Keys, paths: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return for each module the option that determines if its inputs are scaled."""
        meant = keys.take("feedforward_modules", (list, str), None)
        if meant is None:
            raise CheckpointError(
                f"{keys.where}: 'feedforward_modules' is missing, so it is unknown which modules scale their inputs; "
                "add it to the config ([] for none)"
            )
        if isinstance(meant, str):
            hit = matching(meant, paths, keys.where)
        else:  # peft wants no dot in front of the name here
            names = tuple(keys.names("feedforward_modules"))
            hit = {path for path in paths if names and path.endswith(names)}
        return {path: {"feedforward_modules": path in hit} for path in paths}

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("init_ia3_weights")
        on_input = keys.take("feedforward_modules", (bool, list, str), False) is True
        return {"method": "ia3", "scale_inputs": ["*"] if on_input else []}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        gain, ones = place.operator.gain.shape, (1,) * len(place.site.kernel)
        shape = (1, *gain, *ones) if ones or place.operator.on_input else (*gain, 1)
        return {"gain": found.take("ia3_l", shape).reshape(gain)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"init_ia3_weights": True}

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        paths = [re.escape(module_key(place.site)) for place in places if place.operator.on_input]
        return {"feedforward_modules": "|".join(paths) or []}

    def write(self, place: Place) -> dict[str, Tensor]:
        gain, ones = place.operator.gain, (1,) * len(place.site.kernel)
        return {"ia3_l": gain.view(1, -1, *ones) if ones or place.operator.on_input else gain.view(-1, 1)}
