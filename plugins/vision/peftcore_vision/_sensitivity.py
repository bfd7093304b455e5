"""Which weights matter: sums of squared gradients over batches, and what a budget of them allots to each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from peftcore import Batch, Site
from peftcore.errors import CalibrationError


def sensitivities(sites: Sequence[Site], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return for each site, by its path, the sum over the batches of (dL/dw)^2, flat, in its logical layout.

    Raises:
        CalibrationError: there is no batch, or no site has a gradient.
    """
    weights = [site.module.get_parameter(site.tensor).requires_grad_(True) for site in sites]
    sums = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    for batch in batches:
        for total, gradient in zip(sums, torch.autograd.grad(batch.loss(), weights, allow_unused=True), strict=True):
            if gradient is not None:  # this batch uses it
                total.add_(gradient.to(total.dtype).square())
    if not any(total.any() for total in sums):
        raise CalibrationError("the loss of the data says nothing of the weights of any target: give other batches")
    return {site.path: site.logical(total).flatten() for site, total in zip(sites, sums, strict=True)}


def update_size(site: Site, rank: int) -> int:
    """Return how many numbers a low-rank update of a matrix has."""
    return math.prod(site.batch) * rank * (site.in_features * math.prod(site.kernel) + site.out_features)


def is_vector(site: Site) -> bool:
    """Whether a site is a bias or the scale of a norm."""
    return len(site.weight_shape) == 1


def counts(scores: Mapping[str, Tensor], tau: int) -> dict[str, int]:
    """Return how many of the `tau` largest scores of all sites each site has."""
    flat = torch.cat(list(scores.values()))
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(min(tau, len(flat))).indices] = True
    parts = chosen.split([len(each) for each in scores.values()])
    return {path: int(part.sum()) for path, part in zip(scores, parts, strict=True)}


def allotted(
    scores: Mapping[str, Tensor], sites: Mapping[str, Site], tau: int, rank: int, ease: float, vector_ease: float
) -> dict[str, int | None]:
    """Return for each site how many of its entries train.

    It is None where all of a vector do, or where a low-rank update takes their place: one that has at most `ease`
    (`vector_ease`) times as many numbers as entries were chosen there.
    """
    found: dict[str, int | None] = {}
    for path, count in counts(scores, tau).items():
        site = sites[path]
        whole, times = (site.numel, vector_ease) if is_vector(site) else (update_size(site, rank), ease)
        found[path] = None if count >= whole / times else count
    return found


def total(allotment: Mapping[str, int | None], sites: Mapping[str, Site], rank: int) -> int:
    """Return how many numbers an allotment trains."""
    whole = {path: site.numel if is_vector(site) else update_size(site, rank) for path, site in sites.items()}
    return sum(whole[path] if count is None else count for path, count in allotment.items())
