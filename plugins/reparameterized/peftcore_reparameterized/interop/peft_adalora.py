"""AdaLoRA in peft's files (checked against peft 0.21).

``lora_A``, ``lora_B`` and ``lora_E`` [rank, 1] are peftcore's A, B and E. Kernels are flattened. Triples that
`rank_pattern` excludes are not in the file, and are read as zeros. The scale is still that of the initial rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place, not_added


class PeftAdaLoRA(PeftMethod):
    """Translates low-rank factors with ranks by importance."""

    methods = ("adalora",)
    below = ("lora_A", "lora_B", "lora_E")
    bias = "lora_only"
    kinds = (nn.Linear, Transposed, nn.Conv2d)
    advice: ClassVar[Mapping[str, str]] = {
        "use_rslora": "use alpha=",
        "target_r": "use target_rank=",
        "init_r": "use rank=",
        "tinit": "use warmup=",
        "tfinal": "use final=",
        "deltaT": "use interval=",
        "orth_reg_weight": "use orthogonality=",
        "total_step": "leave it out: pass the number of steps to the schedule",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("init_lora_weights", "total_step", "rank_pattern")  # the last one is seen at the tensors
        keys.pass_over("r", "use_rslora", "alpha_pattern", "loftq_config", "qalora_group_size")  # LoRA's; unused here
        keys.only("use_dora", False)
        keys.only("lora_bias", False)
        rank, alpha = keys.take("init_r", int, 12), keys.take("lora_alpha", float, 8)
        return {
            "method": "adalora",
            "rank": rank,
            "target_rank": keys.take("target_r", int, 8),
            "alpha": float(alpha if alpha > 0 else rank),
            "dropout": float(keys.take("lora_dropout", float, 0.0)),
            "warmup": keys.take("tinit", int, 0),
            "final": keys.take("tfinal", int, 0),
            "interval": keys.take("deltaT", int, 1),
            "beta1": float(keys.take("beta1", float, 0.85)),
            "beta2": float(keys.take("beta2", float, 0.85)),
            "orthogonality": float(keys.take("orth_reg_weight", float, 0.5)),
        }

    def differs(self, place: Place) -> str:
        module = place.site.module
        return "groups" if isinstance(module, nn.Conv2d) and module.groups > 1 else not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        A, B = place.operator.A, place.operator.B
        rank = min(found.shape("lora_E")[0], len(A)) if found.has("lora_E") else len(A)
        kept = {
            "A": found.take("lora_A", (rank, *A.shape[1:]), (rank, A[0].numel())),
            "B": found.take("lora_B", (len(B), rank)),
            "E": found.take("lora_E", (rank, 1)).flatten(),
        }
        tensors = {name: value.new_zeros(place.operator.get_parameter(name).shape) for name, value in kept.items()}
        tensors["A"][:rank], tensors["B"][:, :rank], tensors["E"][:rank] = kept["A"], kept["B"], kept["E"]
        return tensors

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "init_r": config.rank,
            "target_r": config.target_rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "tinit": config.warmup,
            "tfinal": config.final,
            "total_step": config.warmup + config.final + 1,  # peft wants one; ours is that of the training
            "deltaT": config.interval,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "orth_reg_weight": config.orthogonality,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        A, B, E = (place.operator.get_parameter(name).detach() for name in "ABE")
        return {"lora_A": A.flatten(1), "lora_B": B, "lora_E": E.unsqueeze(-1)}
