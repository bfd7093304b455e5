"""Lily in peft's files (checked against peft 0.21).

``lily_router`` is peftcore's router. ``lily_A`` and ``lily_B`` [experts * rank, out] are stored for each module, even
if modules share them. If modules share one tensor in peftcore, their tensors in the file must be equal. peft groups
modules by the entry of target_modules that they match: by name, as in peftcore, or all in one group if target_modules
is a single pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place


class PeftLily(PeftMethod):
    """Translates routers, and the factors that modules share."""

    methods = ("lily",)
    below = ("lily_A.weight", "lily_B.weight", "lily_router.weight")
    kinds = (nn.Linear,)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "stride_A": "use stride=",
        "num_B": "use experts=",
        "scaling": "use scale=",
    }

    def __init__(self) -> None:
        self.shared: dict[str, Tensor] = {}
        """Values of shared factors, by their names in peftcore."""

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        one = isinstance(keys.take("target_modules", (str, list), []), str)
        return {
            "method": "lily",
            "rank": keys.take("r", int, 32),
            "stride": keys.take("stride_A", int, 1),
            "experts": keys.take("num_B", int, 2),
            "scale": float(keys.take("scaling", float, 1.0)),
            "across": "shape" if one else "name",
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        operator = place.operator
        for peft, name, module in zip("AB", operator.names, (operator.A.module, operator.B.module), strict=True):
            shape = module.weight.shape
            value = found.take(f"lily_{peft}.weight", (shape[:-1].numel(), shape[-1])).view(shape)
            if not torch.equal(self.shared.setdefault(name, value), value):
                found.wrong.append(f"lily_{peft} of {place.site.path} differs from that of its name and shape")
        return {"router": found.take("lily_router.weight", operator.router.shape)}

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        return {"weight": self.shared[name]}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"r": config.rank, "stride_A": config.stride, "num_B": config.experts, "scaling": config.scale}

    def write(self, place: Place) -> dict[str, Tensor]:
        operator = place.operator
        A, B = operator.A.module.weight, operator.B.module.weight
        return {
            "lily_A.weight": A.clone(),
            "lily_B.weight": B.flatten(0, 1).clone(),
            "lily_router.weight": operator.router,
        }
