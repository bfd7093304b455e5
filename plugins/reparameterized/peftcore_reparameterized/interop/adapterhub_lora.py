"""LoRA in AdapterHub's files (checked against adapters 1.3.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftcore.author import Resolver
from peftcore.author.formats import Found, HubArchitecture, HubPlace, Keys


class HubLoRA(HubArchitecture):
    """Translates ``lora_A`` and ``lora_B``, which are A and B of peftcore's LoRA. The scale is alpha / r."""

    holder = "loras"

    def options(self, keys: Keys, shapes: Mapping[str, Any], resolver: Resolver) -> dict[str, Any]:
        keys.pass_over("attn_matrices", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out")
        keys.pass_over("init_weights", "init_weights_seed", "dtype")
        keys.only("use_gating", False)
        keys.only("use_dora", False)
        dropout, alpha = keys.take("dropout", float, 0.0), keys.take("alpha", float)
        return {"method": "lora", "rank": keys.take("r", int), "alpha": float(alpha), "dropout": float(dropout)}

    def read(self, place: HubPlace, operator: Any, found: Found) -> dict[str, Tensor]:
        return {"A": found.take("lora_A", operator.A.shape), "B": found.take("lora_B", operator.B.shape)}
