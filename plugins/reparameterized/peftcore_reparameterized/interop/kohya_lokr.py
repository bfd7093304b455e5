"""LoKr in files of LyCORIS (checked against LyCORIS 4.1).

``lokr_w1`` is peftcore's w1, ``lokr_w1_a`` is its w1a, and so on. In a convolution, a full ``lokr_w2`` also has the
dimensions of the kernel. The file does not contain the option `factor`, which is derived from the shapes. If both
factors are full, the scale is 1 whatever alpha is, and LyCORIS writes the rank as alpha. Outputs are those of LyCORIS
in training, which applies the scale once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor

from peftcore.author.formats import Found, Held, KohyaMethod, Place
from peftcore.errors import CheckpointError
from peftcore_reparameterized.lokr import _cut


class KohyaLoKr(KohyaMethod):
    """Translates the low-rank Kronecker product."""

    methods = ("lokr",)
    below = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    telling = below
    dropouts = ("rank_dropout", "rank_dropout_scale", "module_dropout")

    def options(self, held: Held) -> dict[str, Any]:
        shapes = held.shapes
        rows, columns = _left(shapes)
        options = {"factor": _factor(held, rows, columns), "tucker": "lokr_t2" in shapes}
        if "lokr_w1" in shapes and "lokr_w2" in shapes:
            return options | {"full_matrix": True, "decompose_both": False}
        rank = held.size("lokr_w2_b", 0) if "lokr_w2_b" in shapes else held.size("lokr_w1_b", 0)
        both = "lokr_w1" not in shapes
        return options | {
            "full_matrix": False, "decompose_both": both, "rank": rank, "alpha": held.alpha(rank),
        }  # fmt: skip

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        second = shapes.get("lokr_w2", shapes.get("lokr_w2_a", Size()))
        if len(second) < 2:
            return -1
        return _left(shapes)[0] * second[1 if "lokr_t2" in shapes else 0]

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        tensors = {}
        for name, value in place.operator.state_dict().items():
            shapes = [tuple(value.shape)]
            if name == "w2" and place.site.kernel:
                shapes.append((len(value), value.shape[1] // math.prod(place.site.kernel), *place.site.kernel))
            tensors[name] = found.take(_theirs(name), *shapes)
        return tensors

    def write(self, place: Place) -> tuple[float, dict[str, Tensor]]:
        held = dict(place.operator.state_dict())
        if "w2" in held and place.site.kernel:
            held["w2"] = held["w2"].view(len(held["w2"]), -1, *place.site.kernel)
        return place.operator.scale * place.config.rank, {_theirs(name): value for name, value in held.items()}


def _theirs(name: str) -> str:
    return f"lokr_{name[:2]}_{name[2]}" if len(name) == 3 else f"lokr_{name}"


def _left(shapes: Mapping[str, Size]) -> tuple[int, int]:
    """Return the numbers of rows and columns of the first factor, or 1 if it is missing. Such a file is refused
    later."""
    first = shapes.get("lokr_w1")
    rows = shapes.get("lokr_w1_a", ())[:1] if first is None else first[:1]
    columns = shapes.get("lokr_w1_b", ())[1:2] if first is None else first[1:2]
    return max((1, *rows)), max((1, *columns))


def _factor(held: Held, rows: int, columns: int) -> int | None:
    """Return the value of the option `factor` with which peftcore splits a weight's dimensions as in the file.

    Raises:
        CheckpointError: there is no such value, as after `unbalanced_factorization`.
    """
    out, inputs = held.weight[:2]
    first = (None, max(rows, columns), out // rows, inputs // columns)
    for factor in (*first, *range(1, max(out, inputs) + 1)):
        if factor != 0 and (_cut(out, factor)[0], _cut(inputs, factor)[0]) == (rows, columns):
            return factor
    raise CheckpointError(
        f"{held.where}: lokr_w1 splits {out} outputs into {rows} and {inputs} inputs into {columns}; peftcore's lokr "
        "needs the smaller part first"
    )
