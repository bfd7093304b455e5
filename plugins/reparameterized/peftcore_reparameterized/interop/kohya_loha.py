"""LoHa in files of LyCORIS (checked against LyCORIS 4.1).

``hada_w1_a`` is peftcore's B1 and ``hada_w1_b`` is its A1; ``hada_w2_a`` and ``hada_w2_b`` are B2 and A2. If kernels
are factored, ``hada_t1`` and ``hada_t2`` are their cores, and ``hada_w1_a`` and ``hada_w2_a`` are transposed. Outputs
are those of LyCORIS in training, which applies alpha / rank once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor

from peftcore.author.formats import Found, Held, KohyaMethod, Place


class KohyaLoHa(KohyaMethod):
    """Translates the low-rank Hadamard product."""

    methods = ("loha",)
    below = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    telling = below
    rows = ("hada_w1_a", "hada_w2_a")
    dropouts = ("rank_dropout", "rank_dropout_scale", "module_dropout")

    def options(self, held: Held) -> dict[str, Any]:
        rank = held.size("hada_w1_b", 0)
        return {"rank": rank, "alpha": held.alpha(rank), "tucker": "hada_t1" in held.shapes}

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        shape = shapes.get("hada_w1_a", ())
        return -1 if len(shape) != 2 else shape[1] if "hada_t1" in shapes else shape[0]

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        tensors, held = {}, place.operator.state_dict()
        for name, value in held.items():
            letter, number = name
            if letter == "B" and f"T{number}" in held:
                tensors[name] = found.take(_theirs(name), value.T.shape).T
            else:
                tensors[name] = found.take(_theirs(name), value.shape)
        return tensors

    def write(self, place: Place) -> tuple[float, dict[str, Tensor]]:
        held = place.operator.state_dict()
        tensors = {
            _theirs(name): value.T if name[0] == "B" and f"T{name[1]}" in held else value
            for name, value in held.items()
        }
        return place.config.alpha, tensors


def _theirs(name: str) -> str:
    letter, number = name[0], name[1:]
    return {"A": f"hada_w{number}_b", "B": f"hada_w{number}_a", "T": f"hada_t{number}"}[letter]
