"""Tensors that train as a whole, in files of LyCORIS, which calls them full and norm (checked against LyCORIS 4.1).

``diff`` and ``diff_b`` are added to weight and bias of a linear map or a convolution, ``w_norm`` and ``b_norm`` to
those of a norm. The values of peftcore replace the whole tensors. Tensors missing in the file keep the host's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Size, Tensor

from peftcore.author.formats import Found, Held, KohyaMethod, Place
from peftcore.errors import ExportError


class _Replaced(KohyaMethod):
    """Translates values that replace tensors of the host."""

    tensors = ("weight", "bias")
    names: ClassVar[Mapping[str, str]]
    """The names of tensors in the file, by their names in the host."""
    of_norms: ClassVar[bool]
    """Whether the modules are norms, whose weight has one dimension."""

    def writes(self, place: Place) -> bool:
        return (len(place.site.at("weight").weight_shape) == 1) == self.of_norms

    def outputs(self, shapes: Mapping[str, Size]) -> int:
        return next(iter(shapes.get(self.names["weight"], ())), -1)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        name, own = self.names[place.site.tensor], _own(place)
        if place.site.tensor == "bias" and not found.has(name):
            return {"value": own}
        change = found.take(name, place.operator.value.shape)
        return {"value": own.to(change) + change}

    def write(self, place: Place) -> tuple[float | None, dict[str, Tensor]]:
        if not self.writes(place):
            raise ExportError(f"LyCORIS cannot hold {place.site.path}; exclude it")
        value = place.operator.value
        return None, {self.names[place.site.tensor]: value - _own(place).to(value)}


class KohyaFull(_Replaced):
    """Translates linear maps and convolutions that train as a whole."""

    methods = ("attention_only", "linear_probe", "ln_tuning", "partial_k")
    below = ("diff", "diff_b")
    telling = ("diff",)
    rows = below
    of_norms = False
    names: ClassVar[Mapping[str, str]] = {"weight": "diff", "bias": "diff_b"}

    def options(self, held: Held) -> dict[str, Any]:
        return {"head": False, "positions": False}


class KohyaNorm(_Replaced):
    """Translates norms that train."""

    methods = ("ln_tuning", "attention_only", "linear_probe", "partial_k")
    below = ("w_norm", "b_norm")
    telling = ("w_norm",)
    of_norms = True
    names: ClassVar[Mapping[str, str]] = {"weight": "w_norm", "bias": "b_norm"}

    def options(self, held: Held) -> dict[str, Any]:
        return {}


def _own(place: Place) -> Tensor:
    """Return the host's tensor."""
    return replace(place.site, meta=False).base_weight().detach()
