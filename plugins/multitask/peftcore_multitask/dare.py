"""DARE: drop most of a change, rescale the rest, then merge.   Yu et al. 2023, arXiv 2311.03099.

Equation:
    tau~_t = m_t * tau_t / (1 - p),   m_t = 1 with probability 1 - p, value by value
    W' = W + s sum_t w_t tau~_t        or, with `merge="ties"`, s times TIES of the w_t tau~_t

The remaining values of each part are so sparse that parts hardly overlap, and rescaling keeps their mean. Masks are
drawn once for each part and site on the CPU, from a seed of `mask_seed`, the part and the number of the site. So they
are the same on every machine, and files contain `mask_seed` instead of the masks.

Parameters: those of the parts. A mask takes one byte for each value of a weight.

Start: Masks are drawn. Fresh parts change nothing.

Differs from the authors' code: The authors' code (yule-BUAA/MergeLM) draws new masks at each merge, and for TIES it
trims to a density of 0.2 afterwards. peft does not trim afterwards, like the default here, and calls 1 - p the density.

Use it: `peftcore.apply(model, "dare")`, with `peftcore_multitask.gather`, with p = 0.9 for small changes, which are
usual in fine-tuning; large changes need a smaller p.
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
    """The masks of a target module depend on the seed and on the module's number, or on its path (in older files). The
    path changes if the model becomes part of a larger model."""
    merge: Literal["linear", "ties"] = "linear"
    """The merge of the sparse changes: their sum, or TIES."""
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """For TIES: the share of all values of a part that is kept."""
    sign: merge_math.Sign = "total"
    """For TIES: how the sign of a value is elected. "total": the sign of the sum. "frequency": the sign that more parts
    have."""
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
