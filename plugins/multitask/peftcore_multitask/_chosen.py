"""LoRAs of one module, mixed by different shares for each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcore.author import Graft, Operator
from peftcore.errors import UnsupportedSite
from peftcore_multitask._merging import Members

Factors = tuple[Tensor, Tensor, float]
"""A [rank, in] and B [out, rank] of a LoRA, and its scale."""


def first_of(members: Members, title: str) -> Graft:
    """Return the first part at one module. All parts there must be LoRAs of a linear layer.

    Raises:
        UnsupportedSite: a part is not a LoRA, or the layer is not linear. `title` is the method's name in the error.
    """
    first = next(iter(members.values()))
    site = first.site
    if any(graft.operator.factors() is None for graft in members.values()):
        raise UnsupportedSite(
            f"{site.path}: a part is not a product of two factors, and {title} chooses among LoRAs; use LoRA parts, or "
            "exclude it"
        )
    if not (site.layer.called and site.layer.of_vectors) or site.batch or site.slices or first.holders[1:]:
        raise UnsupportedSite(
            f"{site.path} is not a linear layer that is called by itself, which the choice among parts needs; exclude "
            "it"
        )
    return first


def add_shares(operator: Operator, y: Tensor, x: Tensor, every: Sequence[Factors], shares: Tensor) -> Tensor:
    """Return y + sum_e c_e s_e B_e A_e x for shares c ``[..., parts]``, inputs x ``[..., in]`` and outputs y ``[...,
    out]``: all A_e and all B_e are concatenated, so this takes two matrix products."""
    scales = torch.tensor([scale for *_, scale in every], dtype=shares.dtype, device=shares.device)
    ranks = torch.tensor([len(A) for A, *_ in every], device=shares.device)
    shares = (shares * scales).repeat_interleave(ranks, -1, output_size=sum(len(A) for A, *_ in every))
    A, B, shares = operator.cast(y, torch.cat([A for A, *_ in every]), torch.cat([B for _, B, _ in every], 1), shares)
    return y + (shares * (x.to(A.dtype) @ A.mT)) @ B.mT
