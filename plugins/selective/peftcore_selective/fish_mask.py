"""FISH Mask: the weights that matter most to the task train.   Sung et al. 2021, arXiv 2111.09839.

Equation:
    F = mean over the examples of (dL/dtheta)^2,   I = the k largest of F,   theta' = theta + scatter(v at I),   v zero

F is the diagonal of the empirical Fisher information, computed once before training (``data=``), in evaluation mode; k
is `share` of all weights, and one ranking covers all of them: embeddings, matrices, norms, biases. The squares are
those of single examples, so each batch must be one example; the square of a mean over a batch is different.

In a quantized model the quantized weights are left out, since their gradients would be as large as the unquantized
weights.

Parameters: share * (those of all sites), in one vector. The file also contains their positions, 8 bytes each.

Start: v at zero. A fresh adapter is the identity.

Differs from the authors' code: v is a difference, so weight decay pulls the trained weights towards the base, and does
not change the others. The authors train the weights themselves and mask gradients. They also train the whole classifier
and subtract its size from k. Here the head is left out unless a target names it; ``train=["classifier"]`` trains it as
a whole, and its size is not subtracted. Their code has options for absolute values instead of squares, and for the
expectation over labels, which needs another forward for each class; they are not available here.

Use it: `peftcore.apply(model, "fish_mask", data=batches)`, where the trained change must be small to send or to store;
half a percent of the weights is usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    Batches,
    Checked,
    LearningRate,
    Method,
    MethodConfig,
    Shared,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
)
from peftcore_selective._fisher import squared_gradients
from peftcore_selective._ties import one_each, tied_to


class FishMaskConfig(MethodConfig):
    """Options of FISH Mask."""

    method: Literal["fish_mask"] = "fish_mask"
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.005
    """Share of the weights that train."""
    samples: PositiveInt = 1024
    """The maximum number of batches for the Fisher information; each batch must be one example."""


class FishMaskUpdate(Checked):
    """The trained differences, and their ascending positions in the concatenation of all sites."""

    index: Tensor

    def __init__(self, count: int, total: int) -> None:
        super().__init__()
        self.total = total
        self.values = nn.Parameter(torch.zeros(count))
        self.register_buffer("index", torch.arange(count))

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        index = values.get("index")
        if index is not None and not (index.diff().gt(0).all() and int(index[0]) >= 0 and int(index[-1]) < self.total):
            yield f"index must hold ascending positions in {self.total} weights"


class FishOperator(WeightOperator):
    """The part of the mask in one tensor."""

    def __init__(self, site: Site, start: int, mask: Shared) -> None:
        super().__init__(site)
        self.start, self.mask = start, mask

    def forward(self, weight: Tensor) -> Tensor:
        size, mask = weight.numel(), self.mask.module
        values, index = (each.to(weight.device) for each in (mask.values, mask.index))
        # How many places lie here is only known on the device, but not more than this; the rest go behind the end.
        window = torch.arange(min(len(index), size), device=weight.device)
        order = torch.searchsorted(index, self.start) + window
        found = order.clamp(max=len(index) - 1)
        place = index[found] - self.start
        inside = (order < len(index)) & (place < size)
        flat = torch.cat([weight.flatten(), weight.new_zeros(len(window))])
        place = torch.where(inside, place, size + window)
        new = flat.gather(0, place) + torch.where(inside, values[found], 0.0)
        return flat.scatter(0, place, new.to(flat.dtype))[:size].view(weight.shape)


class FishMask(Method):
    """Train the weights with the largest Fisher information."""

    name = "fish_mask"
    Config = FishMaskConfig
    tags = Tags(category="selective", paper="2111.09839", mergeable=True, needs_data=True)
    learning_rate = LearningRate(
        5e-5,
        "varunnair18/FISH@b5bff1e, transformers/examples/text-classification/scripts/lib.sh",
        on="BERT-large, GLUE",
    )
    target = "*"

    def inject(self, model: nn.Module, config: FishMaskConfig, surgeon: Surgeon) -> None:
        heads = surgeon.at("head") if surgeon.wishes.target is None else ()
        left_out = {site.module_path for site in heads}
        sites = [site for site in surgeon.sites() if site.module_path not in left_out]
        tensors = one_each(each for site in sites for each in map(site.at, site.tensors()) if _there(each))
        total = sum(each.numel for each in tensors)
        count = max(1, int(config.share * total))
        mask = surgeon.own("mask", lambda: FishMaskUpdate(count, total))
        start = 0
        for each in tensors:
            holders = tuple(map(_stored, tied_to(each, surgeon)))
            surgeon.graft(_stored(each), FishOperator, None, holders, start=start, mask=mask)
            start += each.numel

    def calibrate(self, model: nn.Module, data: Batches, config: FishMaskConfig, injection: AppliedMethod) -> None:
        model.eval()
        sites = [graft.site for graft in injection.grafts if graft.by_method]
        weights = [site.module.get_parameter(site.tensor) for site in sites]
        for weight in weights:
            weight.requires_grad_(True)
        fisher = squared_gradients(weights, islice(data, config.samples))
        parts = [site.logical(fisher[weight]).flatten() for site, weight in zip(sites, weights, strict=True)]
        index = injection.shared["mask"].get_buffer("index")
        index.copy_(torch.cat(parts).topk(len(index)).indices.sort().values)

    @staticmethod
    def parameter_count(site: Site, config: FishMaskConfig) -> int:
        return 0  # all of them are in the mask, which belongs to no site


def _there(site: Site) -> bool:
    """Return whether the site's weight exists, is floating-point and is not quantized. Only such weights have
    gradients."""
    dense = not site.layer.packed and not site.missing(site.tensor)
    return dense and site.module.get_parameter(site.tensor).is_floating_point()


def _stored(site: Site) -> Site:
    """Return the site with its tensor in the stored layout, so that different modules (an embedding and a head) can
    share it."""
    return replace(site, form="weight", layer=site.layer if site.slices else site.layer.as_stored)
