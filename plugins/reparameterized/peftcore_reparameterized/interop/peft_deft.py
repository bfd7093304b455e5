"""DEFT in peft's files (checked against peft 0.21): ``deft_P`` and ``deft_R`` are peftcore's P and R."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore.errors import ExportError


class PeftDEFT(PeftMethod):
    """Translates the components that are removed from weights and injected into them."""

    methods = ("deft",)
    below = ("deft_P", "deft_R")
    bias = "deft_only"
    kinds = (nn.Linear, Transposed)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "decomposition_method": "use projection=",
        "init_scale": "leave it out: a fresh adapter starts as in its paper",
        "para": "use injects=, the opposite",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("init_scale")  # of a start that the tensors are
        alpha = keys.take("alpha", (float, type(None)), None)
        return {
            "method": "deft",
            "rank": keys.take("r", int, 8),
            "alpha": float(alpha) if alpha else None,  # peft takes 0 for none
            "projection": keys.take("decomposition_method", str, "relu"),
            "injects": not keys.take("para", bool, False),
            "dropout": float(keys.take("deft_dropout", float, 0.0)),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {name: found.take(f"deft_{name}", value.shape) for name, value in place.operator.named_parameters()}

    def write_options(self, config: Any) -> dict[str, Any]:
        if config.alpha is not None and config.alpha != int(config.alpha):
            raise ExportError(f"peft's DEFT needs an integer alpha, not {config.alpha}")
        return {
            "r": config.rank,
            "alpha": None if config.alpha is None else int(config.alpha),
            "decomposition_method": config.projection,
            "para": not config.injects,
            "deft_dropout": config.dropout,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        return {f"deft_{name}": value for name, value in place.operator.named_parameters()}
