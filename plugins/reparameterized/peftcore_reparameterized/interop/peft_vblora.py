"""VB-LoRA in peft's files (checked against peft 0.21).

``vblora_logits_A`` and ``vblora_logits_B`` are the logits of peftcore, and ``vblora_vector_bank``, which is stored for
the whole adapter, contains the vectors of its bank. A file with `save_only_topk_weights` contains the indices of the k
largest logits, and their weights except the last one. These k logits are read as the logarithms of the weights. The
other logits are -inf in peft, and are never chosen again. They are read as -10,000, because files of peftcore cannot
contain infinite values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place, not_added
from peftcore.errors import CheckpointError

LOGITS = ("vblora_logits_A", "vblora_logits_B")
NEVER = -1e4
"""The logit of a vector whose index is not in a file."""


class PeftVBLoRA(PeftMethod):
    """Translates logits over the vectors of a bank."""

    methods = ("vb_lora",)
    below = (*LOGITS, *(f"{each}_topk_{part}" for each in LOGITS for part in ("indices", "weights")))
    root = ("vblora_vector_bank",)
    bias = "vblora_only"
    kinds = (nn.Linear, Transposed)
    shortened = False
    """Whether the file that is being read contains only the largest logits."""
    advice: ClassVar[Mapping[str, str]] = {
        "save_only_topk_weights": "leave it out: files have all logits",
        "init_vector_bank_bound": "use bank_bound=",
        "init_logits_std": "use logits_std=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        self.shortened = keys.take("save_only_topk_weights", bool, False)
        return {
            "method": "vb_lora",
            "rank": keys.take("r", int, 4),
            "num_vectors": keys.take("num_vectors", int, 256),
            "vector_length": keys.take("vector_length", int, 256),
            "topk": keys.take("topk", int, 2),
            "dropout": float(keys.take("vblora_dropout", float, 0.0)),
            "bank_bound": float(keys.take("init_vector_bank_bound", float, 0.02)),
            "logits_std": float(keys.take("init_logits_std", float, 0.1)),
            "logits_ratio": 1.0,
        }

    def differs(self, place: Place) -> str:
        length = place.config.vector_length
        if place.site.in_features % length or place.site.out_features % length:
            return (
                f"a vector_length={length} that does not divide {place.site.in_features} and {place.site.out_features}"
            )
        return not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        shapes = place.operator.logits_A.shape, place.operator.logits_B.shape
        names = zip(("logits_A", "logits_B"), LOGITS, shapes, strict=True)
        if not self.shortened:
            return {ours: found.take(theirs, shape) for ours, theirs, shape in names}
        return {ours: _from_largest(found, theirs, shape, place.config.topk) for ours, theirs, shape in names}

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        return {"vectors": found.take("vblora_vector_bank", module.get_parameter("vectors").shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "r": config.rank,
            "num_vectors": config.num_vectors,
            "vector_length": config.vector_length,
            "topk": config.topk,
            "vblora_dropout": config.dropout,
            "init_vector_bank_bound": config.bank_bound,
            "init_logits_std": config.logits_std,
            "save_only_topk_weights": False,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        return {"vblora_logits_A": place.operator.logits_A, "vblora_logits_B": place.operator.logits_B}

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        return {"base_model.vblora_vector_bank": module.get_parameter("vectors")}


def _from_largest(found: Found, name: str, shape: Size, k: int) -> Tensor:
    """Return the logits that give the weights in a file, from the indices and weights of the k largest ones."""
    chosen = found.take(f"{name}_topk_indices", (*shape[:-1], k)).long()
    weights = found.take(f"{name}_topk_weights", (*shape[:-1], k - 1))
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    if chosen.numel() and not (chosen.min() >= 0 and chosen.max() < shape[-1]):
        raise CheckpointError(f"{name}_topk_indices has indices outside of the {shape[-1]} vectors of the bank")
    if not (weights >= -1e-6).all():
        raise CheckpointError(f"{name}_topk_weights has weights below 0, or with a sum above 1")
    return torch.full(shape, NEVER).scatter(-1, chosen, weights.float().clamp(min=1e-30).log())
