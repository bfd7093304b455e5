"""SHiRA: sparse high-rank adapters.   Bhardwaj et al. 2024, arXiv 2406.13175.

Equation:
    W' = W + scatter(v at I),   |I| = rank * (in * kernel + out) entries of W,   v zero at the start

sparsity=0.99 with mask="magnitude" is Super-Tuning (arXiv 2607.09287): I has floor((1 - sparsity) * in * kernel * out)
entries. `low_rank` adds s B A of that rank, s = alpha / low_rank, A uniform in +-1/sqrt(in * kernel); this is the Supra
variant of Super-Tuning.

The method trains as many numbers as LoRA of the same rank. But its update is sparse and of high rank, and two such
updates hardly overlap. The entries are drawn at random (SHiRA-Rand), or are the largest of |W| (SHiRA-WM), or the
smallest of |W|. Each expert has separate entries.

Parameters: |I| a site, and low_rank * (in * kernel + out), times the number of experts.

Start: v at zero, and B of `low_rank` at zero. A fresh adapter is the identity.

Differs from the authors' code: The masks of the paper by rows, diagonals or gradients are not available (fish_mask
chooses by gradients). The file contains I, since the adapter consists of I and v. peft draws I again from a seed, but
its file lacks the seed if the user set none. The forward of peft builds the whole update and adds it to the weight;
here only the entries of I are read and written, each rounded once to the weight's dtype. peft also has a dropout for
the low-rank part; here there is none, since the part is added to the weight.

Use it: `peftcore.apply(model, "shira")`, to switch fast between adapters on one base, or to add several: a switch
touches one to two percent of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags, WeightOperator
from peftcore.errors import UnsupportedSite


class SHiRAConfig(MethodConfig):
    """Options of SHiRA."""

    method: Literal["shira"] = "shira"
    rank: PositiveInt = 32
    """Sets the number of trained entries: as many as LoRA of this rank has parameters. It does not limit the rank of
    the update."""
    mask: Literal["random", "magnitude", "smallest"] = "random"
    """How the entries are chosen: drawn at random, or those with the largest or the smallest magnitudes."""
    sparsity: Share | None = None
    """The share of entries that stay frozen; if set, `rank` is ignored."""
    low_rank: NonNegativeInt = 0
    """Rank of a low-rank update in addition to the entries; 0 leaves it out."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / low_rank`` of the low-rank update."""


def ends(site: Site) -> int:
    """Return the number of LoRA's parameters per rank: inputs plus outputs."""
    return site.in_features * math.prod(site.kernel) + site.out_features


def entries(site: Site, config: SHiRAConfig) -> int:
    """Return how many entries train in each matrix of the site."""
    if config.sparsity is None:
        return config.rank * ends(site)
    return int(math.prod(site.weight_shape[len(site.batch) :]) * (1 - config.sparsity))


def largest(weight: Tensor, batch_dims: int, count: int, smallest: bool = False) -> Tensor:
    """Return the positions of the largest (or smallest) magnitudes of each matrix in `weight`, the largest (or
    smallest) first."""
    return weight.flatten(batch_dims).abs().topk(count, largest=not smallest).indices


class SHiRAOperator(WeightOperator):
    """Adds trained values to some entries of a weight, and stores the entries' positions."""

    index: Tensor

    def __init__(self, site: Site, config: SHiRAConfig) -> None:
        super().__init__(site)
        size, count = math.prod(site.weight_shape[len(site.batch) :]), entries(site, config)
        if count > size:
            raise UnsupportedSite(
                f"{site.path} has {size} entries, but rank={config.rank} needs {count}; lower the rank for it with "
                "overrides=, or exclude the site"
            )
        if not count:
            raise UnsupportedSite(
                f"{site.path} has {size} entries, of which sparsity={config.sparsity} leaves none to train; lower it "
                "for this site with overrides=, or exclude the site"
            )
        # 32 bits halve the file, and no matrix of 2**31 entries is in sight
        index = self._choose(site, config, size, count).sort(-1).values.to(torch.int32)
        self.size = size
        self.register_buffer("index", index)  # [*batch, count]
        self.values = nn.Parameter(torch.zeros(index.shape))
        self.scale = config.alpha / config.low_rank if config.low_rank else 0.0
        if config.low_rank:
            A = torch.empty(*site.batch, config.low_rank, site.in_features, *site.kernel)
            bound = 1 / math.sqrt(site.in_features * math.prod(site.kernel))
            self.A = nn.Parameter(A.uniform_(-bound, bound))
            self.B = nn.Parameter(torch.zeros(*site.batch, site.out_features, config.low_rank))

    @staticmethod
    def _choose(site: Site, config: SHiRAConfig, size: int, count: int) -> Tensor:
        if config.mask != "random":
            return largest(site.weight(), len(site.batch), count, config.mask == "smallest")
        drawn = [torch.randperm(size)[:count] for _ in range(math.prod(site.batch))]
        return torch.stack(drawn).view(*site.batch, count)

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        if "index" in values:
            places, _ = values["index"].sort(-1)
            if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < self.size:
                yield f"index has entries outside of the {self.size} entries of a matrix"
            elif places.diff(dim=-1).eq(0).any():
                yield "index has an entry twice"

    def forward(self, weight: Tensor) -> Tensor:
        flat, index = weight.flatten(self.layer.batch_dims), self.index.long()
        new = (flat.gather(-1, index) + self.values).to(flat.dtype)  # in the values' precision, rounded once
        sparse = flat.scatter(-1, index, new).view(weight.shape)
        if not self.scale:
            return sparse
        update = (self.scale * self.B) @ self.A.flatten(self.layer.batch_dims + 1)
        return (sparse + update.view(weight.shape)).to(weight.dtype)


class SHiRA(Method):
    """Sparse high-rank adapters."""

    name = "shira"
    Config = SHiRAConfig
    tags = Tags(category="selective", paper="2406.13175", mergeable=True)
    learning_rate = LearningRate(5e-4, "arXiv 2406.13175v2, table 9", on="LLaMA-7B, commonsense")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: SHiRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, SHiRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: SHiRAConfig) -> int:
        return math.prod(site.batch) * (entries(site, config) + config.low_rank * ends(site))
