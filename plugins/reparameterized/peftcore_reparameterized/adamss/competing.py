"""Clusters of outputs that compete during training: their importance, and the choice of clusters that continue to
train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from peftcore.author import Operator


class Competing(Operator):
    """An operator with one factor A for each cluster, ``[*batch, K, rank, width]``, and a factor B ``[*batch, out,
    rank]``. It stores moving averages of each cluster's importance, and which clusters train."""

    A: Tensor
    B: Tensor
    cluster: Tensor
    """The cluster of each output, ``[*batch, out]``."""
    ranks: Tensor
    """The rank of each cluster, ``[*batch, K]``."""
    active: Tensor
    """Whether a cluster trains, ``[*batch, K]``."""
    competing = False
    """Whether clusters are dropped in training."""

    def compete(self, competing: bool) -> None:
        """Register the buffers for the competition, if `competing` is True. A and B must be set before."""
        self.competing = competing
        if competing:
            self.register_buffer("active", torch.ones_like(self.ranks, dtype=torch.bool), persistent=False)
            for name, factor in list(self.named_parameters(recurse=False)):
                for what in ("importance", "fluctuation", "kept"):
                    self.register_buffer(f"{what}_{name}", torch.zeros_like(factor), persistent=False)

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        for name, first, end in (("cluster", 0, self.A.shape[-3]), ("ranks", 1, self.A.shape[-2] + 1)):
            found = values.get(name)
            if found is not None and not first <= int(found.min()) <= int(found.max()) < end:
                yield f"{name} holds numbers that are not from {first} to {end - 1}"

    def of(self, name: str, each: Tensor) -> Tensor:
        """Return values of the clusters, [*batch, K], in a shape that broadcasts over A or B."""
        return each.unsqueeze(-1).unsqueeze(-1) if name == "A" else each.gather(-1, self.cluster).unsqueeze(-1)

    def trained(self, name: str) -> Tensor:
        """Return A or B with zeros beyond the rank of each cluster; dropped clusters are detached."""
        factor = self.get_tensor(name)
        if self.competing:
            factor = torch.where(self.of(name, self.active), factor, factor.detach())
        place = torch.arange(self.A.shape[-2], device=factor.device)
        return factor * (place.unsqueeze(-1) if name == "A" else place).lt(self.of(name, self.ranks))

    def hold(self) -> None:
        """Restore the values of dropped clusters, which momentum and weight decay still change."""
        for name, factor in self.named_parameters():
            kept = self.get_buffer(f"kept_{name}")
            factor.copy_(torch.where(self.of(name, self.active), factor, kept))
            kept.copy_(factor)

    def observe(self, beta1: float, beta2: float) -> None:
        """Update the moving averages from the gradients."""
        for name, factor in self.named_parameters():
            if factor.grad is not None:
                change = (factor * factor.grad).abs()
                mean, spread = self.get_buffer(f"importance_{name}"), self.get_buffer(f"fluctuation_{name}")
                spread.mul_(beta2).add_((change - mean).abs(), alpha=1 - beta2)
                mean.mul_(beta1).add_(change, alpha=1 - beta1)

    def scores(self) -> Tensor:
        """Return the importance of each cluster, [*batch, K], and reset the moving averages."""
        A, B = (self.get_buffer(f"importance_{name}") * self.get_buffer(f"fluctuation_{name}") for name in "AB")
        rows = torch.zeros_like(A[..., 0, 0]).scatter_add(-1, self.cluster, B.sum(-1))
        sizes = torch.zeros_like(self.ranks).scatter_add(-1, self.cluster, torch.ones_like(self.cluster))
        score = A.sum((-1, -2)) / (self.ranks * A.shape[-1]) + rows / (self.ranks * sizes)
        for name in ("importance_A", "importance_B", "fluctuation_A", "fluctuation_B"):
            self.get_buffer(name).zero_()
        return score


def choose(operators: Sequence[Competing], target: int) -> None:
    """Stop training all clusters except those whose score is above the target-th largest score of all operators. If at
    most `target` clusters train, none is stopped."""
    scores = [operator.scores() for operator in operators]
    every = torch.cat([score[operator.active] for operator, score in zip(operators, scores, strict=True)])
    if target < len(every):
        threshold = -(-every).kthvalue(target).values
        for operator, score in zip(operators, scores, strict=True):
            operator.active.logical_and_(score > threshold)
