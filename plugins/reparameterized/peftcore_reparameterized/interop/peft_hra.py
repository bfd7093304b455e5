"""HRA in peft's files (checked against peft 0.21): ``hra_u`` contains the vectors u_i as columns; in peftcore they are
rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place, not_added, uneven
from peftcore.errors import CheckpointError


class PeftHRA(PeftMethod):
    """Translates Householder reflections."""

    methods = ("hra",)
    below = ("hra_u",)
    bias = "hra_only"
    kinds = (nn.Linear, nn.Conv2d)
    advice: ClassVar[Mapping[str, str]] = {
        "apply_GS": "use gram_schmidt=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        rank = keys.take("r", int, 8)
        if rank < 2 or rank % 2:
            raise CheckpointError(
                f"{keys.where}: 'r' is {rank}; peftcore's hra has an even number of reflections, since the first and "
                "the second of a pair start as one"
            )
        return {"method": "hra", "rank": rank, "gram_schmidt": keys.take("apply_GS", bool, False)}

    def differs(self, place: Place) -> str:
        return uneven(place.site.module) or not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {"U": found.take("hra_u", place.operator.U.mT.shape).mT}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"r": config.rank, "apply_GS": config.gram_schmidt}

    def write(self, place: Place) -> dict[str, Tensor]:
        return {"hra_u": place.operator.U.mT.contiguous()}
