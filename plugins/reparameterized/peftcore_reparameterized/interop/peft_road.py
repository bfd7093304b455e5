"""RoAd in peft's files (checked against peft 0.21): ``road_theta`` is `angle` in peftcore, and ``road_alpha`` is
`length`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore.errors import CheckpointError

NAMES = {"angle": "road_theta", "length": "road_alpha"}
VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


class PeftRoAd(PeftMethod):
    """Translates rotations of pairs of outputs."""

    methods = ("road",)
    below = tuple(NAMES.values())
    kinds = (nn.Linear,)
    adds = True

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        variant = keys.take("variant", str, "road_1")
        if variant not in VARIANTS:
            raise CheckpointError(f"{keys.where}: RoAd with variant = {variant!r} is unknown to peftcore")
        return {"method": "road", "variant": VARIANTS[variant], "group_size": keys.take("group_size", int, 64)}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {ours: found.take(theirs, place.operator.angle.shape) for ours, theirs in NAMES.items()}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"variant": f"road_{config.variant}", "group_size": config.group_size}

    def write(self, place: Place) -> dict[str, Tensor]:
        return {theirs: place.operator.get_tensor(ours) for ours, theirs in NAMES.items()}
