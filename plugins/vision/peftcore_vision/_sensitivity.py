"""Which weights matter: sums of squared gradients over batches, and the numbers that a budget allots to each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from peftcore import Batch
from peftcore.author import Site
from peftcore.errors import CalibrationError, InactiveSite


def sensitivities(sites: Sequence[Site], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return for each site, by its path, the sum over the batches of (dL/dw)^2, flat, in its logical layout.

    Raises:
        CalibrationError: data is missing, or all gradients are zero.
        InactiveSite: the loss is computed from none of the weights.
    """
    weights = [site.module.get_parameter(site.tensor).requires_grad_(True) for site in sites]
    sums = {each: torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in weights}
    used = False
    for batch in batches:
        gradients = torch.autograd.grad(batch.loss(), list(sums), allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:  # this batch uses it
                used = True
                total.add_(gradient.to(total.dtype).square())
    if not used:
        raise InactiveSite(
            f"the loss of the data is computed without {sites[0].path} and all other targets: name modules in "
            "target= that the model calls for such data"
        )
    if not any(total.any() for total in sums.values()):
        raise CalibrationError("the loss of the data says nothing of the weights of any target: give other batches")
    return {site.path: site.logical(sums[each]).flatten() for site, each in zip(sites, weights, strict=True)}


def update_size(site: Site, rank: int) -> int:
    """Return how many numbers a low-rank update of a matrix has."""
    return math.prod(site.batch) * rank * (site.in_features * math.prod(site.kernel) + site.out_features)


def is_vector(site: Site) -> bool:
    """Whether a site is a bias or the scale of a norm."""
    return len(site.weight_shape) == 1


def counts(scores: Mapping[str, Tensor], taus: Sequence[int]) -> Iterator[dict[str, int]]:
    """Yield for each τ how many of the τ largest scores of all sites each site has."""
    flat = torch.cat(list(scores.values()))
    largest = flat.topk(min(max(taus), len(flat))).indices  # of all τ, since one ranking takes long
    ends = torch.tensor([len(each) for each in scores.values()], device=flat.device).cumsum(0)
    holders = torch.bucketize(largest, ends, right=True)
    for tau in taus:
        yield dict(zip(scores, holders[:tau].bincount(minlength=len(scores)).tolist(), strict=True))


def allotted(
    counted: Mapping[str, int], sites: Mapping[str, Site], rank: int, ease: float, vector_ease: float
) -> dict[str, int | None]:
    """Return for each site how many of its entries train, of as many as were chosen there.

    It is None where all of a vector do, or where a low-rank update takes their place: one that has at most `ease`
    (`vector_ease`) times as many numbers as entries were chosen there.
    """
    found: dict[str, int | None] = {}
    for path, count in counted.items():
        site = sites[path]
        whole, times = (site.numel, vector_ease) if is_vector(site) else (update_size(site, rank), ease)
        found[path] = None if count >= whole / times else count
    return found


def total(allotment: Mapping[str, int | None], sites: Mapping[str, Site], rank: int) -> int:
    """Return how many numbers an allotment trains."""
    whole = {path: site.numel if is_vector(site) else update_size(site, rank) for path, site in sites.items()}
    return sum(whole[path] if count is None else count for path, count in allotment.items())


def nearest(
    scores: Mapping[str, Tensor], sites: Mapping[str, Site], budget: float, rank: int, ease: float, vector_ease: float
) -> dict[str, int | None]:
    """Return the allotment that trains the number of parameters nearest to `budget`.

    τ runs from a twentieth of the budget to nearly four times as much; among equally near allotments the last is taken.
    """
    taus = [max(1, round(step * budget / 20)) for step in range(1, 80)]
    plans = [allotted(each, sites, rank, ease, vector_ease) for each in counts(scores, taus)]
    return min(reversed(plans), key=lambda plan: abs(total(plan, sites, rank) - budget))
