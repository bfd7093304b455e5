"""BEFT in peft's files (checked against peft 0.21): `bitfit` at linear layers.

``beft_bias`` [1, out] is added to the outputs. The value of `bitfit` is the whole bias: the host's bias plus
``beft_bias``. If the host lacks a bias, the value is ``beft_bias``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place


class PeftBEFT(PeftMethod):
    """Translates biases."""

    methods = ("bitfit",)
    below = ("beft_bias",)

    def differs(self, place: Place) -> str:
        site = place.site
        linear = isinstance(site.module, nn.Linear) and site.tensor == "bias" and site.slices is None
        return "" if linear else "tensors other than biases of linear layers"

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        return {"method": "bitfit", "add_missing_bias": True, "head": False}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        length = place.operator.value.shape
        added = found.take("beft_bias", (1, *length)).view(length)
        return {"value": _own(place).to(added) + added}

    def write(self, place: Place) -> dict[str, Tensor]:
        value = place.operator.value
        return {"beft_bias": (value - _own(place).to(value)).view(1, -1)}


def _own(place: Place) -> Tensor:
    """Return the bias of the host, or zeros if it has none."""
    return replace(place.site, meta=False).base_weight().detach()
