"""DeLoRA in peft's files (checked against peft 0.21): ``delora_A`` and ``delora_B`` are peftcore's A and B,
``delora_lambda`` is its strength, and ``delora_w_norm`` is its n. The rank is read from the shapes of the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place

NAMES = {"A": "delora_A", "B": "delora_B", "strength": "delora_lambda", "n": "delora_w_norm"}


class PeftDeLoRA(PeftMethod):
    """Translates low-rank updates of bounded strength."""

    methods = ("delora",)
    below = tuple(NAMES.values())
    bias = "delora_only"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "lambda_pattern": "delora_lambda"}
    kinds = (nn.Linear,)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "delora_lambda": "use strength=",
        "lambda_pattern": 'use overrides={"*.q_proj": {"strength": 4}}',
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        rank = keys.take("r", int, 8)
        return {
            "method": "delora",
            "rank": shapes["delora_A"][0] if "delora_A" in shapes else rank,
            "strength": float(keys.take("delora_lambda", float, 15)),
            "dropout": float(keys.take("module_dropout", float, 0.0)),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        taken = {ours: found.take(theirs, self._of(place, ours).shape) for ours, theirs in NAMES.items()}
        return taken | {"n": taken["n"].unsqueeze(0)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"r": config.rank, "delora_lambda": config.strength, "module_dropout": config.dropout}

    def write(self, place: Place) -> dict[str, Tensor]:
        return {theirs: self._of(place, ours) for ours, theirs in NAMES.items()}

    def _of(self, place: Place, name: str) -> Tensor:
        """Return a tensor in peft's shape."""
        tensor: Tensor = place.operator.get_tensor(name)
        return tensor[0] if name == "n" else tensor
