"""LoKr in peft's files (checked against peft 0.21).

Names are those of peftcore with the prefix ``lokr_``, and with ``_a`` and ``_b`` for the two factors of a product. In a
convolution, a full ``w2`` also has the dimensions of the kernel. In a one-dimensional convolution, t2 has an additional
last dimension of size 1. There, with a full w2, the product has another order in peft, which the option `layout`
selects. If both factors are full, peft still scales by alpha / rank. peftcore multiplies w2 by that scale when it reads
the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place, not_added
from peftcore.errors import ExportError

NAMES = {
    "w1": "lokr_w1", "w1a": "lokr_w1_a", "w1b": "lokr_w1_b",
    "w2": "lokr_w2", "w2a": "lokr_w2_a", "w2b": "lokr_w2_b", "t2": "lokr_t2",
}  # fmt: skip


class PeftLoKr(PeftMethod):
    """Translates the low-rank Kronecker product."""

    methods = ("lokr",)
    below = tuple(NAMES.values())
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    advice: ClassVar[Mapping[str, str]] = {
        "use_effective_conv2d": "use tucker=",
        "decompose_factor": "use factor=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        factor = keys.take("decompose_factor", int, -1)
        return {
            "method": "lokr",
            "rank": keys.take("r", int, 8),
            "alpha": float(keys.take("alpha", float, 8)),
            "factor": None if factor == -1 else max(factor, 1),  # anything else below one leaves the dimensions whole
            "factor_first": factor > 0,
            "decompose_both": keys.take("decompose_both", bool, False),
            "tucker": keys.take("use_effective_conv2d", bool, False),
            "layout": "peft" if len(shapes.get("lokr_w2", ())) == 3 else "kronecker",
            "rank_dropout": float(keys.take("rank_dropout", float, 0.0)),
            "rank_dropout_scale": keys.take("rank_dropout_scale", bool, False),
            "module_dropout": float(keys.take("module_dropout", float, 0.0)),
        }

    def differs(self, place: Place) -> str:
        site, factor = place.site, place.config.factor
        operator = place.operator
        full = isinstance(site.module, nn.Conv1d) and "w2" in operator.state_dict()
        if full and not operator.mixes_kernel and max(operator.factor("w1").shape) > 1:
            return "a full second factor in one dimension, unless layout is 'peft'"
        larger = [size for size in (site.out_features, site.in_features)
                  if factor and size % factor == 0 and factor > size // factor]  # fmt: skip
        if larger and not place.config.factor_first:
            return f"factor={factor} unless factor_first is set, since it is the larger part of {larger[0]}"
        return not_added(site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        site, tensors = place.site, {}
        for name, value in place.operator.state_dict().items():
            with_kernel = (value.shape[0], -(-value.shape[-1] // math.prod(site.kernel)), *site.kernel)
            others = {"w2": with_kernel, "t2": (*value.shape, 1)}
            tensors[name] = found.take(NAMES[name], value.shape, others.get(name, value.shape))
        if tensors.keys() == {"w1", "w2"}:
            tensors["w2"] = tensors["w2"] * (place.config.alpha / place.config.rank)
        return tensors

    def write_options(self, config: Any) -> dict[str, Any]:
        if config.full_matrix:
            raise ExportError(
                "peft has no full_matrix; set rank to half of the larger dimension or more, which makes factors full "
                "too"
            )
        return {
            "r": config.rank,
            "alpha": config.alpha,
            "decompose_factor": -1 if config.factor is None else config.factor,
            "decompose_both": config.decompose_both,
            "use_effective_conv2d": config.tucker,
            "rank_dropout": config.rank_dropout,
            "rank_dropout_scale": config.rank_dropout_scale,
            "module_dropout": config.module_dropout,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        kernel, held = place.site.kernel, dict(place.operator.state_dict())
        if held.keys() == {"w1", "w2"}:
            held["w2"] = held["w2"] / (place.config.alpha / place.config.rank)
        if "w2" in held and kernel:
            held["w2"] = held["w2"].unflatten(-1, (-1, *kernel))
        if "t2" in held and len(kernel) == 1:
            held["t2"] = held["t2"].unsqueeze(-1)
        return {NAMES[name]: value for name, value in held.items()}
