"""GLoRA in files of LyCORIS (checked against LyCORIS 4.1).

``a1`` [in, rank] and ``a2`` [rank, in] are the factors of A of `glora`, which multiplies the weight (``A="product"``).
``b1`` and ``b2`` are the factors of B. For convolutions they are stored as kernels, of size one except for ``b2``. In
`glora` the scale alpha / rank is included in the first factors. LyCORIS lacks C, D and E.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor

from peftcore.author.formats import ALPHA, Found, Held, KohyaMethod, Place, spelled
from peftcore.errors import ExportError

THEIRS = {"A": "a1.weight", "A_up": "a2.weight", "B": "b1.weight", "B_up": "b2.weight"}
KINDS = {"A": ("product", "none"), "B": ("lora", "none"), "C": ("none",), "D": ("none",), "E": ("none",)}
"""The kinds of each term that a file can contain; files are read as the first kind."""


class KohyaGLoRA(KohyaMethod):
    """Translates the low-rank matrices A, which multiplies the weight, and B, which is added to it."""

    methods = ("glora",)
    below = tuple(THEIRS.values())
    telling = ("a1.weight",)

    def options(self, held: Held) -> dict[str, Any]:
        rank = held.size("a2.weight", 0)
        held.alpha(rank)
        return {"rank": rank} | {term: kinds[0] for term, kinds in KINDS.items()}

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        return next(iter(shapes.get("b1.weight", ())), -1)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        shapes, rank = _shapes(place), place.config.rank
        scale = found.take(ALPHA, (), (1,)) / rank if found.has(ALPHA) else 1.0
        values = {name: found.take(theirs, *spelled(shapes[name])) for name, theirs in THEIRS.items()}
        matrices = {name: value.flatten(1) for name, value in values.items()}
        return matrices | {name: scale * matrices[name] for name in ("A", "B")}

    def writes(self, place: Place) -> bool:
        return all(getattr(place.config, term) in kinds for term, kinds in KINDS.items())

    def write(self, place: Place) -> tuple[float | None, dict[str, Tensor]]:
        site = place.site
        if not self.writes(place):
            raise ExportError(
                "LyCORIS's glora supports A='product', B='lora' and C, D, E='none' (or A='vector' alone, as its ia3); "
                f"{site.path} has other options"
            )
        if getattr(site.module, "groups", 1) > 1:
            raise ExportError(f"LyCORIS's glora does not support a grouped convolution such as {site.path}; exclude it")
        own, ones = place.operator._parameters, (1,) * len(site.kernel)
        tensors = {}
        for name, shape in _shapes(place).items():
            value = own[name] if name in own else site.weight().new_zeros(shape)
            tensors[THEIRS[name]] = value.reshape(shape if len(shape) > 2 else (*shape, *ones))
        return float(place.config.rank), tensors


def _shapes(place: Place) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of `glora`; that of `B_up` includes the kernel."""
    site, rank = place.site, place.config.rank
    inputs = site.in_features
    return {"A": (inputs, rank), "A_up": (rank, inputs), "B": (site.out_features, rank),
            "B_up": (rank, inputs, *site.kernel)}  # fmt: skip
