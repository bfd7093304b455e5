"""RandLoRA in peft's files (checked against peft 0.21).

``randlora_lambda`` and ``randlora_gamma`` are peftcore's L and G. The bases ``randlora_A`` [rank, 1, short] and
``randlora_B`` [long, bases, rank] are stored for the whole adapter, with copies at each module. They are large enough
for a site with the most outputs and the most inputs of all sites. If a file lacks the bases (`save_projection` is
false), peft draws them from a seed. peftcore draws the same ones, and saves them with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore_reparameterized.interop._corners import corner
from peftcore_reparameterized.randlora import Bases


class PeftRandLoRA(PeftMethod):
    """Translates scales of random bases."""

    methods = ("randlora",)
    below = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")
    root = ("randlora_A", "randlora_B")
    bias = "randlora_only"
    kinds = (nn.Linear, Transposed)
    adds = True
    saved = True
    """Whether the file that is being read contains the bases."""
    advice: ClassVar[Mapping[str, str]] = {
        "projection_prng_key": "use projection_seed=",
        "save_projection": "use store_basis=",
        "sparse": "use basis=",
        "very_sparse": "use basis=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        self.saved = keys.take("save_projection", bool, True)
        sparse, very_sparse = keys.take("sparse", bool, False), keys.take("very_sparse", bool, False)
        return {
            "method": "randlora",
            "rank": keys.take("r", int, 32),
            "alpha": float(keys.take("randlora_alpha", float, 640)),
            "basis": "very_sparse" if very_sparse else "sparse" if sparse else "uniform",
            "dropout": float(keys.take("randlora_dropout", float, 0.0)),
            "projection_seed": keys.take("projection_prng_key", int, 0),
            "store_basis": True,
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        found.used.update(found.names[each] for each in self.root if found.has(each))  # copies of what belongs to all
        L, G = place.operator.L.shape, place.operator.G.shape
        return {"L": found.take("randlora_lambda", L), "G": found.take("randlora_gamma", G)}

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        assert isinstance(module, Bases)
        (rank, short), B = module.A.shape, module.B.shape
        if self.saved:
            return {"A": corner(found, "randlora_A", (rank, 1, short))[:, 0], "B": corner(found, "randlora_B", B)}
        found.used.update(found.names.values())  # peft passes over what it does not expect
        drawn = _as_peft_draws(module)
        return {"A": drawn[0][:, 0, :short], "B": drawn[1][: B[0], : B[1]]}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "r": config.rank,
            "randlora_alpha": config.alpha,
            "randlora_dropout": config.dropout,
            "sparse": config.basis == "sparse",
            "very_sparse": config.basis == "very_sparse",
            "projection_prng_key": config.projection_seed,
            "save_projection": True,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        L, G = place.operator.L.detach(), place.operator.G.detach()
        share = place.operator.scale * place.config.rank / place.config.alpha  # of the scale that peft has
        return {"randlora_lambda": L * share, "randlora_gamma": G}

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        assert isinstance(module, Bases)
        rank, short, long = len(module.A), min(module.span), max(module.span)
        A = module.A.new_zeros(rank, 1, short)
        B = module.B.new_zeros(long, -(-short // rank), rank)
        A[:, 0, : module.A.shape[1]] = module.A
        B[: len(module.B), : module.B.shape[1]] = module.B
        return {"base_model.randlora_A": A, "base_model.randlora_B": B}


def _as_peft_draws(bases: Bases) -> tuple[Tensor, Tensor]:
    """Return the matrices that peft draws from a seed. Dense ones are drawn in bfloat16, as in peft on machines that
    support it."""
    config, short, long = bases.config, min(bases.span), max(bases.span)
    generator = torch.Generator().manual_seed(config.projection_seed)
    rank, count = config.rank, -(-short // config.rank)
    if config.basis == "uniform":
        bound = math.sqrt(1 / short), math.sqrt(1 / rank)
        A = torch.empty(rank, 1, short, dtype=torch.bfloat16).uniform_(-bound[0], bound[0], generator=generator)
        each = [torch.empty(long, 1, rank, dtype=torch.bfloat16).uniform_(-bound[1], bound[1], generator=generator)
                for _ in range(count)]  # fmt: skip
        B = torch.cat(each, 1)
    else:
        rare = 1 / (2 * (3 if config.basis == "sparse" else math.sqrt(short)))
        A = torch.rand(rank, 1, short, generator=generator, dtype=torch.float32)
        B = torch.rand(long, count, rank, generator=generator, dtype=torch.float32)
        A, B = ((each > 1 - rare).float() - (each < rare).float() for each in (A, B))
    return A / A.std(), B / B.std()
