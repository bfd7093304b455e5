"""SHiRA: sparse high-rank adapters.   Bhardwaj et al. 2024, arXiv 2406.13175.

    W' = W + scatter(v at I),   |I| = rank * (in * kernel + out) entries of W,   v zero at the start

As many numbers as LoRA of that rank has, but the update is sparse and of high rank, and two of them hardly meet. The
entries are drawn evenly (SHiRA-Rand), or are the largest of |W| (SHiRA-WM); experts choose one by one. The paper's
other masks follow rows and diagonals, or gradients: fish_mask chooses by gradients.

I is in the file, since it is the adapter as much as v is; peft draws it anew from a seed that its file lacks when
there was none. peft's forward builds the whole update and adds it to the weight; here only the entries of I are read
and written, each rounded once to the weight's dtype.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Use it to switch fast between adapters on one base, or to add several: a switch touches one to two percent of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore import MATRICES, LearningRate, Method, MethodConfig, Site, Surgeon, Tags, WeightOperator
from peftcore.errors import UnsupportedSite


class Config(MethodConfig):
    """Options of SHiRA."""

    method: Literal["shira"] = "shira"
    rank: PositiveInt = 32
    """Sets how many entries train: as many as LoRA of this rank has. The update's own rank is not bounded by it."""
    mask: Literal["random", "magnitude"] = "random"
    """How the entries are chosen: drawn evenly, or the largest weights."""


def entries(site: Site, config: Config) -> int:
    """Return how many entries train in each matrix of the site."""
    return config.rank * (site.in_features * math.prod(site.kernel) + site.out_features)


class SHiRAOperator(WeightOperator):
    """Adds values to some entries of a weight, and holds which these are."""

    index: Tensor

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        size, count = math.prod(site.weight_shape[len(site.batch) :]), entries(site, config)
        if count > size:
            raise UnsupportedSite(
                f"{site.path} has {size} entries, but rank={config.rank} asks for {count}; lower the rank there "
                "(overrides=) or exclude the site"
            )
        # 32 bits halve the file, and no matrix of 2**31 entries is in sight
        index = self._choose(site, config, size, count).sort(-1).values.to(torch.int32)
        self.size = size
        self.register_buffer("index", index)  # [*batch, count]
        self.values = nn.Parameter(torch.zeros(index.shape))

    @staticmethod
    def _choose(site: Site, config: Config, size: int, count: int) -> Tensor:
        if config.mask == "magnitude":
            return site.weight().flatten(len(site.batch)).abs().topk(count).indices
        drawn = [torch.randperm(size)[:count] for _ in range(math.prod(site.batch))]
        return torch.stack(drawn).view(*site.batch, count)

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        if "index" in values:
            places, _ = values["index"].sort(-1)
            if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < self.size:
                yield f"index holds places outside of the {self.size} entries of a matrix"
            elif places.diff(dim=-1).eq(0).any():
                yield "index holds a place twice"

    def forward(self, weight: Tensor) -> Tensor:
        flat, index = weight.flatten(self.layer.batch_dims), self.index.long()
        new = (flat.gather(-1, index) + self.values).to(flat.dtype)  # in the values' precision, rounded once
        return flat.scatter(-1, index, new).view(weight.shape)


class SHiRA(Method):
    """Sparse high-rank adapters."""

    name = "shira"
    Config = Config
    tags = Tags(category="selective", paper="2406.13175", mergeable=True)
    learning_rate = LearningRate(5e-4, "arXiv 2406.13175v2, table 9", on="LLaMA-7B, commonsense")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, SHiRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        return math.prod(site.batch) * entries(site, config)
