"""MonteCLoRA in peft's files: the option `monteclora_config`, and the tensors of a sampler in addition to A and B.

``std_prior`` and ``expert_weights_prior`` of peft's sampler are peftcore's t and p. The other tensors of the sampler
are its last draw, which is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, Place, is_one_of
from peftcore_reparameterized.interop.peft_lora.variant import LoRAVariant

SAMPLER = "lora_monteclora_sampler"
PRIORS = {"t": f"{SAMPLER}.std_prior", "p": f"{SAMPLER}.expert_weights_prior"}
"""Names of tensors in peft, by their names in peftcore."""
DRAWS = (f"{SAMPLER}.gaussian_var_prior", f"{SAMPLER}.expert_weights")
"""The last draw of the sampler: a covariance [rank, rank], and the weight of each sample."""
OPTIONS = {
    "samples": ("num_samples", 8),
    "sample_scale": ("sample_scaler", 1e-4),
    "prior": ("dirichlet_prior", 0.1),
    "kl": ("kl_loss_weight", 1e-5),
    "entropy": ("use_entropy", False),
}
"""Names and defaults of peft's options, by their names in peftcore."""


class MonteCLoRAVariant(LoRAVariant):
    """Low-rank factors, and the priors of the factors that are sampled in training."""

    reads = "monteclora"
    writes = ("monteclora",)
    below = (*PRIORS.values(), *DRAWS)

    def marked(self, keys: Keys) -> bool:
        return bool(keys.table("monteclora_config"))

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        inside = Keys(keys.table("monteclora_config"), keys.where)
        inside.pass_over("buffer_size")
        own = {mine: inside.take(name, type(default), default) for mine, (name, default) in OPTIONS.items()}
        inside.check_known()
        return {**common, **own}

    def differs(self, place: Place) -> str:
        linear = is_one_of(place.site, (nn.Linear,))
        return "" if linear else "a sampler, which it has only in linear layers"

    def read(self, place: Place, found: Found, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        operator = place.operator
        rank, samples = len(operator.A), len(operator.p)
        priors = {mine: found.take(name, operator.get_tensor(mine).shape) for mine, name in PRIORS.items()}
        for name, shape in zip(DRAWS, ((rank, rank), (samples,)), strict=True):
            found.take(name, shape)
        return {**factors, **priors}

    def write_options(self, config: Any) -> dict[str, Any]:
        told = {theirs: getattr(config, mine) for mine, (theirs, _) in OPTIONS.items()}
        return {"monteclora_config": {**told, "buffer_size": 150}}

    def write(self, place: Place) -> dict[str, Tensor]:
        A, p = place.operator.A, place.operator.p
        draws = torch.eye(len(A), dtype=A.dtype), torch.full_like(p, 1 / len(p))
        priors = {name: place.operator.get_tensor(mine) for mine, name in PRIORS.items()}
        return {**priors, **dict(zip(DRAWS, draws, strict=True))}
