"""DARE: drop most of a change, rescale the rest, then merge.   Yu et al. 2023, arXiv 2311.03099.

Equation:
    tau~_t = m_t * tau_t / (1 - p),   m_t = 1 with probability 1 - p, value by value
    W' = W + s sum_t w_t tau~_t        or, with `merge="ties"`, s times TIES of the w_t tau~_t

The rest of each part is so sparse that parts hardly overlap, and keeps the mean. Masks are drawn once for each part and
site, from (mask_seed, part, number of the site) on the CPU, so that they are the same everywhere; files have
`mask_seed` instead of them.

Parameters: those of the parts. A mask takes one byte for each value of a weight.

Start: Masks are drawn; of fresh parts nothing changes.

Differs from the authors' code: The authors' code (yule-BUAA/MergeLM) draws anew at each merge and trims for TIES to 0.2
afterwards; peft trims no more, like the default here, and calls 1 - p the density.

Use it: `peftcore.apply(model, "dare")`, with `peftcore_multitask.gather`, at p = 0.9 for changes that are small, as
fine-tuning makes them; large changes need a smaller p.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcore.author import Method, Share, Site, Surgeon, Tags, merge_math
from peftcore_multitask._merging import Members, MergingOperator, OfMergedParts, PartsConfig, merge_parts


class DAREConfig(PartsConfig):
    """Options of DARE."""

    method: Literal["dare"] = "dare"
    drop_rate: Share = 0.9
    """Probability p with which a value is dropped."""
    mask_seed: int = 0
    """Seed of the masks."""
    masks: Literal["numbered", "by path"] = "numbered"
    """The key of each target module's masks: its number, or its path (older files), which changes in a larger model."""
    merge: Literal["linear", "ties"] = "linear"
    """The merge of the sparse changes: their sum, or TIES."""
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """For TIES: the share of all values of a part that is kept."""
    sign: merge_math.Sign = "total"
    """For TIES: the sign that is elected, that of the sum ("total") or that of more parts ("frequency")."""
    scale: float = 1.0
    """The factor s of the merged change."""


class DAREOperator(MergingOperator):
    """Merges the masked deltas of the parts; the masks are fixed."""

    def __init__(self, site: Site, config: DAREConfig, members: Members, number: int = 0) -> None:
        super().__init__(site, config, members, number)
        self.config = config
        shape, place = site.weight_shape, number if config.masks == "numbered" else site.path
        for index in self.parts:
            for name, sizes in (("mask", shape), ("bias_mask", shape[: self.layer.batch_dims + 1])):
                digest = hashlib.sha256(f"{config.mask_seed}:{index}/{place}:{name}".encode()).digest()
                mask = self._drawn(sizes, int.from_bytes(digest[:8], "big") >> 1, site.meta)
                self.register_buffer(f"{name}_{index}", mask, persistent=False)

    def _drawn(self, shape: torch.Size, seed: int, meta: bool) -> Tensor:
        if meta:
            return torch.empty(shape, dtype=torch.bool, device="meta")
        generator = torch.Generator().manual_seed(seed)
        return merge_math.random_mask(shape, 1 - self.config.drop_rate, generator)

    def _rest(self, index: str, delta: Tensor) -> Tensor:
        mask = self.get_buffer(f"mask_{index}")
        if mask.shape != delta.shape:
            mask = self.get_buffer(f"bias_mask_{index}")
        return delta * mask / (1 - self.config.drop_rate)

    def combined(self, deltas: dict[str, Tensor]) -> Tensor:
        rest, weights = [self._rest(*each) for each in deltas.items()], [self.weights[index] for index in deltas]
        if self.config.merge == "ties":
            return self.config.scale * merge_math.ties(rest, weights, self.config.density, self.config.sign)
        return self.config.scale * merge_math.linear(rest, weights)


class DARE(OfMergedParts, Method):
    """Changes of weights, thinned out at random before they are merged."""

    name = "dare"
    Config = DAREConfig
    config_version = 2
    former_defaults = ({"masks": "by path"},)
    tags = Tags(category="multitask", paper="2311.03099", mergeable=True)
    target = ()

    def inject(self, model: nn.Module, config: DAREConfig, surgeon: Surgeon) -> None:
        merge_parts(surgeon, config, DAREOperator)
