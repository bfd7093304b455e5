"""LoRA and DoRA in files of kohya's sd-scripts and of LyCORIS (checked against LyCORIS 4.1 and diffusers 0.42).

``lora_down`` is peftcore's A and ``lora_up`` is its B, which in a convolution has a kernel of size 1. The scale is
alpha / rank. A DyLoRA is written with all its ranks. Its file is the same as that of a LoRA, and is read as LoRA. A
file can also contain ``diff_b``, which is added to the bias, as in files for Wan. ``dora_scale`` [out, 1, ...] is
peftcore's magnitude. LyCORIS can also compute the norm over the outputs, one for each input (`wd_on_output=False`).
peftcore does not support that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor

from peftcore.author.formats import Found, Held, KohyaMethod, Place, spelled
from peftcore.errors import CheckpointError

DOWN, UP, MAGNITUDE, BIAS = "lora_down.weight", "lora_up.weight", "dora_scale", "diff_b"


class KohyaLoRA(KohyaMethod):
    """Translates low-rank factors of linear maps and convolutions."""

    methods: ClassVar[tuple[str, ...]] = ("lora", "lora_plus", "dylora")
    below: ClassVar[tuple[str, ...]] = (DOWN, UP)
    telling: ClassVar[tuple[str, ...]] = (DOWN, UP)
    beside: ClassVar[Mapping[str, str]] = {BIAS: "bias"}
    rows = (UP, BIAS)
    factors = (DOWN, UP)

    def options(self, held: Held) -> dict[str, Any]:
        rank = held.size(DOWN, 0)
        return {"rank": rank, "alpha": held.alpha(rank)}

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        return next(iter(shapes.get(UP, ())), -1)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        A, B = place.operator.A.shape, place.operator.B.shape
        return {"A": found.take(DOWN, *spelled(A)), "B": found.take(UP, *spelled(B))}

    def write(self, place: Place) -> tuple[float, dict[str, Tensor]]:
        A, B = place.operator.A, place.operator.B
        ones = [1 for _ in place.site.kernel]
        return place.operator.scale * len(A), {DOWN: A, UP: B.view(*B.shape, *ones)}


class KohyaDoRA(KohyaLoRA):
    """Translates low-rank factors with a magnitude for each output."""

    methods = ("dora",)
    below = (DOWN, UP, MAGNITUDE)
    telling = (MAGNITUDE,)
    beside: ClassVar[Mapping[str, str]] = {}
    rows = (UP, MAGNITUDE)

    def options(self, held: Held) -> dict[str, Any]:
        outputs = held.weight[0]
        if held.size(MAGNITUDE, 0) != outputs and MAGNITUDE in held.shapes:
            raise CheckpointError(
                f"{held.where}: dora_scale has shape {tuple(held.shapes[MAGNITUDE])}, not one value for each of the "
                f"{outputs} outputs; with one for each input (wd_on_output=False) it is another method than peftcore's "
                "dora"
            )
        return super().options(held)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        (size,) = place.operator.magnitude.shape
        magnitude = found.take(MAGNITUDE, (size,), *((size, *[1] * count) for count in (1, 2, 3, 4)))
        return super().read(place, found) | {"magnitude": magnitude}

    def write(self, place: Place) -> tuple[float, dict[str, Tensor]]:
        alpha, tensors = super().write(place)
        magnitude = place.operator.magnitude
        return alpha, tensors | {MAGNITUDE: magnitude.view(-1, 1, *(1 for _ in place.site.kernel))}
