"""Super-Tuning in peft's files (checked against peft 0.21): `shira` with a sparsity.

``supertuning_values`` [entries] is added to the flat weight at ``supertuning_indices`` [entries], in the order of
magnitude. `shira` stores the indices in ascending order. A file may lack the indices; then they are those of the
largest (or the smallest) entries of the host's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore.errors import ExportError
from peftcore_selective.shira import largest

FACTORS = {"A": "supertuning_lora_A.weight", "B": "supertuning_lora_B.weight"}


class PeftSupertuning(PeftMethod):
    """Translates a share of a weight's entries, and the low-rank update that is added to them."""

    methods = ("shira",)
    below = ("supertuning_values", "supertuning_indices", *FACTORS.values())
    kinds = (nn.Linear,)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "select_top": "use mask=",
        "lora_dropout": "leave it out: the method has no dropout",
        "save_precomputed_indices": "leave it out: files have the positions of the trained entries",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("save_precomputed_indices")
        rank = keys.take("r", int, 0)
        dropout = keys.take("lora_dropout", float, 0.0)
        if rank and dropout:
            keys.warn(
                f"inputs of the low-rank part had dropout {dropout} in training; peftcore applies none if it trains on"
            )
        return {
            "method": "shira",
            "mask": "magnitude" if keys.take("select_top", bool, True) else "smallest",
            "sparsity": float(keys.take("sparsity", float, 0.99)),
            "low_rank": rank,
            "alpha": float(keys.take("lora_alpha", float, 2 * rank or 16)),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        site, operator = place.site, place.operator
        values, size = found.take("supertuning_values", operator.values.shape), site.numel
        if found.has("supertuning_indices"):
            index = found.take("supertuning_indices", operator.index.shape)
        else:
            weight = replace(site, meta=False).base_weight().detach()
            index = largest(weight, 0, len(values), place.config.mask == "smallest")
        index, order = index.long().sort()
        if ((index < 0) | (index >= size)).any() or (index.diff() == 0).any():
            found.wrong.append(f"the supertuning_indices of {site.path} are not distinct entries of {size}")
        factors = {each: found.take(name, operator.get_tensor(each).shape)
                   for each, name in FACTORS.items() if place.config.low_rank}  # fmt: skip
        return {"index": index.to(torch.int32), "values": values[order], **factors}

    def holds(self, config: Any) -> bool:
        return config.sparsity is not None and config.mask != "random"

    def write_options(self, config: Any) -> dict[str, Any]:
        if not self.holds(config):
            raise ExportError(
                "peft's SUPERTUNING selects the largest or the smallest entries by sparsity, not random ones; use "
                "peftcore's own format"
            )
        low_rank = {"r": config.low_rank, "lora_alpha": config.alpha} if config.low_rank else {}
        return {"sparsity": config.sparsity, "select_top": config.mask == "magnitude", **low_rank}

    def write(self, place: Place) -> dict[str, Tensor]:
        operator = place.operator
        factors = {name: operator.get_tensor(each) for each, name in FACTORS.items() if place.config.low_rank}
        return {"supertuning_values": operator.values, "supertuning_indices": operator.index, **factors}
