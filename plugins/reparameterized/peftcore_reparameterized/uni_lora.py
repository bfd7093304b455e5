"""Uni-LoRA: one trained vector for all factors.   Li et al. 2025, arXiv 2506.00799 (KaiyangLi1992/Uni-LoRA).

Equation:
    y = W x + b + B A dropout(x),   each entry of A [rank, in] and B [out, rank] of every site is  theta[i] / sqrt(n_i)

An index i is drawn for each of the D entries of all sites together, and n_i is the number of entries with the index i.
So the projection of theta [d] to all entries is isometric. The draw is balanced: each i occurs D / d times, rounded up
or down, as in peft (by the same authors). The update is not scaled.

Files contain only theta. The indices depend only on `projection_seed` and the sites, including their order, so loading
draws the same ones. With `store_indices` files also contain the indices, which are as large as a LoRA. Embeddings and
kernels of convolutions have factors as in LoRA, separate ones for each expert.

Parameters: d in all, for any number of sites.

Start: theta uniform in +-`theta_bound`: a fresh adapter changes outputs a little.

Differs from the authors' code: The code of the paper draws each entry independently. peft, by the same authors, draws
different indices. When a file of peft is loaded, its indices are used.

Use it: `peftcore.apply(model, "uni_lora")`, where an adapter must be tiny, and you want to choose its size freely. It
takes as much computation as LoRA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Share, Shared, Site, Surgeon, Tags
from peftcore_reparameterized._low_rank import LowRankOperator, low_rank_count


class UniLoRAConfig(MethodConfig):
    """Options of Uni-LoRA."""

    overridable = ("rank", "dropout")

    method: Literal["uni_lora"] = "uni_lora"
    rank: PositiveInt = 4
    """Rank of the update."""
    theta_length: PositiveInt = 23040
    """Length d of the vector theta, which contains all trained parameters."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    theta_bound: PositiveFloat = 0.02
    """Bound of the uniform distribution that the initial vector is drawn from."""
    projection_seed: NonNegativeInt = 42
    """Seed of the indices that are drawn for the entries."""
    store_indices: bool = False
    """Store the drawn indices in files, which makes them larger. Indices loaded from another library's file are always
    stored."""


@functools.lru_cache(maxsize=1)
def drawn_indices(total: int, length: int, seed: int) -> Tensor:
    """Return, for each of the `total` entries of all factors, its index in the vector theta. All indices occur about
    equally often. The result is cached for all sites, and drawn on the CPU also while planning."""
    generator = torch.Generator("cpu").manual_seed(seed)
    some_first = torch.randperm(length, generator=generator, device="cpu")
    return some_first.int()[torch.randperm(total, generator=generator, device="cpu") % length]


class Theta(nn.Module):
    """The vector theta, and the factor 1 / sqrt(n_i) for each of its entries."""

    norm: Tensor

    def __init__(self, config: UniLoRAConfig, total: int) -> None:
        super().__init__()
        bound, length = config.theta_bound, config.theta_length
        self.theta = nn.Parameter(torch.empty(length).uniform_(-bound, bound))
        counts = drawn_indices(total, length, config.projection_seed).bincount(minlength=length)
        self.register_buffer("norm", counts.clamp(min=1).double().rsqrt(), persistent=config.store_indices)


class UniLoRAOperator(LowRankOperator):
    """The factors of one site, as indices into the vector theta."""

    index_A: Tensor
    index_B: Tensor

    def __init__(self, site: Site, config: UniLoRAConfig, theta: Shared, start: int, total: int) -> None:
        super().__init__(site, config.dropout)
        self.theta, self.total, self.length = theta, total, config.theta_length
        A = (*site.batch, config.rank, site.in_features, *site.kernel)
        B = (*site.batch, site.out_features, config.rank)
        self.starts = start, start + math.prod(A)  # of A and of B among the entries of all sites
        drawn = drawn_indices(total, config.theta_length, config.projection_seed)
        for name, first, shape in zip("AB", self.starts, (A, B), strict=True):
            index = drawn[first : first + math.prod(shape)].view(shape).clone()
            self.register_buffer(f"index_{name}", index, persistent=config.store_indices)

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        for name in {"index_A", "index_B"} & values.keys():
            index = values[name]
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.length:
                yield f"{name} has entries outside of the {self.length} entries of the vector"

    def factors(self) -> tuple[Tensor, Tensor, float]:
        values = self.theta.module.theta * self.theta.module.norm
        return values[self.index_A], values[self.index_B], 1.0


class UniLoRA(Method):
    """Low-rank adaptation whose factors are projections of one vector."""

    name = "uni_lora"
    Config = UniLoRAConfig
    tags = Tags(category="reparameterized", paper="2506.00799", mergeable=True, identity_at_init=False, low_rank=True)
    learning_rate = LearningRate(
        5e-3, "KaiyangLi1992/Uni-LoRA@e622e78, NLU/NLU/scripts_unilora_qv/roberta_base_cola.sh", on="RoBERTa-base, CoLA"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: UniLoRAConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        counts = [low_rank_count(site, config.at(site.path).rank) for site in sites]
        total, start = sum(counts), 0
        theta = surgeon.own("theta", partial(Theta, config, total))
        for site, count in zip(sites, counts, strict=True):
            surgeon.graft(site, UniLoRAOperator, config, theta=theta, start=start, total=total)
            start += count

    @staticmethod
    def parameter_count(site: Site, config: UniLoRAConfig) -> int:
        return 0
