"""PEANuT in peft's files (checked against peft 0.21).

``peanut_A`` and ``peanut_B`` are peftcore's A and B. ``peanut_encoders.0``, ``.1``, … are the layers of its E, and
``peanut_decoders.0``, … those of its D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore.errors import CheckpointError, ExportError
from peftcore_reparameterized.peanut import Activation

DEPTH = 32
"""Maximum number of encoders, and of decoders, in a file."""
SIDES = {"E": "encoders", "D": "decoders"}
SYNONYMS = {"swish": "silu"}


class PeftPEANuT(PeftMethod):
    """Translates the layers of a network."""

    methods = ("peanut",)
    below = (
        "peanut_A.weight",
        "peanut_B.weight",
        *(f"peanut_{side}.{i}.weight" for side in SIDES.values() for i in range(DEPTH)),
    )
    kinds = (nn.Linear,)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "act_fn": "use activation=",
        "scaling": "use scale=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        act = keys.take("act_fn", str, "relu")
        act = SYNONYMS.get(act, act)
        if act not in (known := get_args(Activation)):
            raise CheckpointError(f"{keys.where}: PEANuT has act_fn = {act!r}; known are {', '.join(known)}")
        return {
            "method": "peanut",
            "rank": keys.take("r", int, 32),
            "depth": keys.take("depth", int, 0),
            "activation": act,
            "scale": float(keys.take("scaling", float, 1.0)),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        operator = place.operator
        tensors = {name: found.take(f"peanut_{name}.weight", operator.get_tensor(name).shape) for name in "AB"}
        for name, side in SIDES.items() if operator.depth else ():
            depth, *shape = operator.get_tensor(name).shape
            tensors[name] = torch.stack([found.take(f"peanut_{side}.{i}.weight", shape) for i in range(depth)])
        return tensors

    def write_options(self, config: Any) -> dict[str, Any]:
        if config.depth > DEPTH:
            raise ExportError(f"depth={config.depth} is more than {DEPTH}, the most that peft's format holds")
        return {"r": config.rank, "depth": config.depth, "act_fn": config.activation, "scaling": config.scale}

    def write(self, place: Place) -> dict[str, Tensor]:
        operator = place.operator
        found = {f"peanut_{name}.weight": operator.get_tensor(name) for name in "AB"}
        for name, side in SIDES.items() if operator.depth else ():
            layers = enumerate(operator.get_tensor(name))
            found |= {f"peanut_{side}.{i}.weight": layer.clone() for i, layer in layers}
        return found
