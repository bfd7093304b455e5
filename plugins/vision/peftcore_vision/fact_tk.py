"""FacT-TK: factor tuning by a Tucker decomposition.   Jie and Deng 2022, arXiv 2212.03145 (code: JieShibo/PETL-ViT).

Equation:
    dW_t = s V Sigma_t U,   Sigma_t^T = sum_k C[:, :, k] P[k, t]

U [r, d], V [d, r] and the core C [r, r, r] are shared by all sites; the only parameters of a slice t are its column
P[:, t]. The page of `fact_tt` defines the slices. If a matrix has several slices, the authors' code reshapes its n
matrices C P [r, r, n] to [r, n r], which distributes their columns over the slices in turn: output p of slice c is
column (c r + p) // n of matrix (c r + p) % n. If the slices divide the inputs, the inputs are distributed in the same
way.

Parameters: r per slice, and 2 d r + r^3 once: 2 d r + r^3 + 12 L r for a ViT of L blocks.

Start: U as a linear layer, C and P from Xavier-uniform draws, V at zero. A fresh adapter is the identity.

Differs from the authors' code: No difference is known: where a matrix has several slices, the authors' code and this
method differ from the equation in the same way.

Use it: `peftcore.apply(model, "fact_tk")`, where `fact_tt` is suitable but has too many parameters. It can be merged.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, Shared, Surgeon, Tags
from peftcore_vision._fact import FactConfig, FactOperator, FactSite, fact_sites, shared_factors


class FactTKConfig(FactConfig):
    """Options of FacT-TK."""

    method: Literal["fact_tk"] = "fact_tk"


class Core(nn.Module):
    """The core C, [rank, rank, rank]."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, rank, rank))
        nn.init.xavier_uniform_(self.weight)


class FactTKOperator(FactOperator):
    """The slices of one site, each a mixture of matrices of the core."""

    def __init__(self, site: FactSite, config: FactTKConfig, U: Shared, V: Shared, core: Shared) -> None:
        super().__init__(site, config, U, V)
        self.core = core
        self.P = nn.Parameter(torch.empty(config.rank, site.count))
        bound = math.sqrt(6 / (config.rank + site.total))  # Xavier's for the columns of all sites together
        nn.init.uniform_(self.P, -bound, bound)

    def middle(self) -> Tensor:
        rows, columns, places = self.cut
        few, many = sorted((rows, columns))
        mixed = (self.core.module.weight @ self.P).unflatten(-1, (*self.batch, places, few, many))
        dealt = mixed.movedim((0, 1), (-3, -2)).flatten(-2).unflatten(-1, (many, -1))  # [..., few, r, many, r]
        if rows >= columns:  # [..., columns, r of inputs, rows, r of outputs]
            dealt = dealt.movedim((-2, -1), (-4, -3))
        return dealt.flatten(-4, -3).flatten(-2)


class FactTK(Method):
    """Low-rank updates that share all parameters between layers, except a few mixing numbers for each layer."""

    name = "fact_tk"
    Config = FactTKConfig
    tags = Tags(category="vision", paper="2212.03145", mergeable=True, low_rank=True, random=True)
    learning_rate = LearningRate(1e-3, "JieShibo/PETL-ViT@026e4f1, FacT/fact_tk.py", on="ViT-B/16, VTAB-1k")
    config_version = 2
    former_defaults = ({"dropout": 0.0},)
    target = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")

    def inject(self, model: nn.Module, config: FactTKConfig, surgeon: Surgeon) -> None:
        sites = fact_sites(surgeon, config)
        U, V = shared_factors(surgeon, sites[0].side, config.rank)
        core = surgeon.own("C", lambda: Core(config.rank))
        for site in sites:
            surgeon.graft(site, FactTKOperator, config, U=U, V=V, core=core)

    @staticmethod
    def parameter_count(site: FactSite, config: FactTKConfig) -> int:
        return site.count * config.rank
