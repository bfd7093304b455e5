"""LoRA and DoRA in peft's files (checked against peft 0.21).

``lora_A`` and ``lora_B`` are our A and B; those of an embedding are called ``lora_embedding_A`` and
``lora_embedding_B``. Stacked experts lie side by side, A [experts * rank, in] and B [out, rank * experts]; a
convolution's B has a kernel of ones. A bias of B adds its share to the module's own bias.

PiSSA and OLoRA: peft decomposes the base again when it loads such a file, so it means W - s B0 A0 + s B A, with the
product s B0 A0 that is the same for all who decompose exactly; ours has A0 and B0 of the host that it is loaded into.
They are written as plain LoRA of twice the rank, which is right on any base that is the same. So is LoRA-XS, of its
rank; what it freezes would train on there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn
from torch.nn.modules.conv import _ConvNd

from peftcore.errors import CheckpointError
from peftcore.interop.found import Found
from peftcore.interop.keys import Keys
from peftcore.interop.peft import PeftMethod, Place
from peftcore.interop.peft_layers import is_one_of
from peftcore.weights import Transposed
from peftcore_reparameterized.lora import LoRA, scale_of

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "lora_ga", "mini_lora")
DECOMPOSED = {"pissa": (nn.Linear, Transposed), "olora": (nn.Linear,)}
"""Starts that take a part out of the base, exactly, and the layers where peft can; our methods have the same names."""
AS_LORA = {"pissa": 2, "olora": 2, "lora_xs": 1}
"""Methods that are written as LoRA, and how many times their rank."""


class PeftLoRA(PeftMethod):
    """Low-rank adaptation, weight-decomposed or not."""

    methods = ("lora", "dora", "lora_plus", *AS_LORA)
    below = (
        "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
        "lora_magnitude_vector", "lora_magnitude_vector.weight",
    )  # fmt: skip
    bias = "lora_only"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying")
        keys.pass_over("qalora_group_size")
        start = keys.take("init_lora_weights", (bool, str), True)
        if isinstance(start, str) and start not in (*PLAIN_STARTS, *DECOMPOSED):
            raise CheckpointError(
                f"{keys.where}: with init_lora_weights = {start!r} peft changes the base's weights when it loads; in "
                "peft, save with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        rank, alpha = keys.take("r", int, 8), keys.take("lora_alpha", float, 8)
        dropout = keys.take("lora_dropout", float, 0.0)
        keys.take("lora_bias", bool, False)
        rs = keys.take("use_rslora", bool, False)
        if rank < 1:
            raise CheckpointError(f"{keys.where}: 'r' is {rank}, but a rank is 1 or more")
        if keys.take("use_dora", bool, False):
            keys.only("lora_bias", False)
            keys.only("init_lora_weights", True, False, *PLAIN_STARTS)
            return {"method": "dora", "rank": rank, "alpha": float(alpha * (math.sqrt(rank) if rs else 1))}
        if start in DECOMPOSED:
            keys.only("lora_bias", False)
            keys.in_training("lora_dropout")
            return {"method": start, "rank": rank, "alpha": float(alpha * (math.sqrt(rank) if rs else 1))}
        scaling = "sqrt_rank" if rs else "rank"
        return {"method": "lora", "rank": rank, "alpha": float(alpha), "scaling": scaling, "dropout": float(dropout)}

    def trains(self, keys: Keys, path: str) -> tuple[str, ...]:
        return (f"{path}.bias",) if keys.take("lora_bias", bool, False) else ()

    def differs(self, place: Place) -> str:
        module = place.site.module
        if isinstance(module, _ConvNd) and module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r}"
        return ""

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        site, operator = place.site, place.operator
        A, B = operator.A.shape, operator.B.shape
        ones = (1,) * len(site.kernel)
        kinds = DECOMPOSED.get(place.config.method)
        if kinds and not is_one_of(site, kinds):
            raise CheckpointError(f"{site.path} is none of the layers that peft decomposes for {place.config.method}")
        if site.layer.one_hot:
            tensors = {"A": found.take("lora_embedding_A", A), "B": found.take("lora_embedding_B", B)}
        elif site.batch:
            experts, out, rank = B
            side_by_side = found.take("lora_B.weight", (out, rank, experts), (out, rank * experts))
            down = found.take("lora_A.weight", A, (experts * rank, *A[2:]))
            tensors = {"A": down, "B": side_by_side.permute(2, 0, 1)}
        else:
            tensors = {"A": found.take("lora_A.weight", A), "B": found.take("lora_B.weight", B, (*B, *ones))}
        if place.graft.operator.state_dict().keys() >= {"magnitude"}:
            name = "lora_magnitude_vector"
            name = name if found.has(name) else f"{name}.weight"
            size = operator.magnitude.shape
            tensors["magnitude"] = found.take(name, size, (1, *size, *ones), (*size, 1), (1, *size))
        return tensors

    def replaced(self, place: Place, config: Mapping[str, Any], found: Found) -> Tensor:
        site = place.site
        here = LoRA.Config.model_validate(dict(config)).at(site.module_path)
        bias = replace(site, meta=False).weight().detach()
        return bias + scale_of(here) * found.take("lora_B.bias", bias.shape)

    def companions(self, keys: Keys) -> list[tuple[str, dict[str, Any]]]:
        tokens = keys.take("trainable_token_indices", (list, dict), None)
        return [("TRAINABLE_TOKENS", {"token_indices": tokens})] if tokens else []

    def write_options(self, config: Any) -> dict[str, Any]:
        times, options = AS_LORA.get(config.method, 1), config.model_dump()
        return {
            "r": times * config.rank,
            "lora_alpha": times * config.alpha,
            "lora_dropout": options.get("dropout", 0.0),
            "use_dora": config.method == "dora",
            "use_rslora": options.get("scaling") == "sqrt_rank",
            "init_lora_weights": True,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        site, operator = place.site, place.operator
        A, B = operator.A.detach(), operator.B.detach()
        if times := AS_LORA.get(place.config.method):
            A, B = _factors(place, times * place.config.rank)
        if site.layer.one_hot:
            tensors = {"lora_embedding_A": A, "lora_embedding_B": B}
        elif site.batch:
            tensors = {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": B.permute(1, 2, 0).flatten(1)}
        else:
            tensors = {"lora_A.weight": A, "lora_B.weight": B.view(*B.shape, *(1 for _ in site.kernel))}
        state = operator.state_dict()
        if "magnitude" in state:
            size, ones = state["magnitude"].shape, [1 for _ in site.kernel]
            tensors["lora_magnitude_vector"] = state["magnitude"].view(1, *size, *ones) if ones else state["magnitude"]
        return tensors


def _factors(place: Place, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of what an operator adds, [*batch, rank, in, *kernel] and [*batch, out, rank]: with zeros where the
    weight has not so many directions."""
    A, B, _ = place.operator.factors()
    lacking, dim = rank - B.shape[-1], len(place.site.batch)
    more = A.new_zeros(*A.shape[:dim], lacking, *A.shape[dim + 1 :])
    return torch.cat([A, more], dim).detach(), torch.cat([B, B.new_zeros(*B.shape[:-1], lacking)], -1).detach()
