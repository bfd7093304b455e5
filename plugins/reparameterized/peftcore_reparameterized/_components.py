"""Principal components of vectors, computed batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore_reparameterized._decomposed import nearly_principal


class Components:
    """The largest principal components of vectors that are added batch by batch (an incremental PCA)."""

    def __init__(self, count: int, tau: float, iterations: int | None) -> None:
        """Look for `count`; settled are those whose directions in two batches have a cosine of at least `tau`."""
        self.count, self.tau, self.iterations, self.seen, self.variation = count, tau, iterations, 0, torch.zeros(())
        self.settled = torch.zeros(count, dtype=torch.bool)
        self.waiting: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:  # x [tokens, in]
        """Go on with a batch; fewer vectors than components wait for the next one."""
        x = torch.cat([self.waiting, x]) if self.waiting is not None else x
        self.waiting = x if len(x) < self.count else None
        if self.waiting is not None:
            return
        mean, seen = x.mean(0), self.seen + len(x)
        rows = x - mean
        variation = rows.square().sum()
        if self.seen:
            gap = (self.seen * len(x) / seen) ** 0.5 * (self.mean - mean)  # [in]
            rows = torch.cat([self.S.unsqueeze(-1) * self.V, rows, gap.unsqueeze(0)])
            variation = variation + self.variation + gap.square().sum()
            mean = self.mean + (mean - self.mean) * len(x) / seen
        _, S, V = nearly_principal(rows, self.count, 2 * self.count, self.iterations)
        if self.seen:
            self.settled = F.cosine_similarity(V, self.V) >= self.tau
        self.mean, self.seen, self.variation, self.S, self.V = mean, seen, variation, S, V

    def shares(self) -> list[float]:
        """Return the share of the variance that each component explains."""
        shares: list[float] = (self.S.square() / self.variation).tolist()
        return shares

    def start(self, rank: int, whiten: bool) -> Tensor:
        """Return the first directions ``[rank, in]``, divided by the roots of their singular values if wished."""
        S, V = self.S[:rank], self.V[:rank]
        return V / S.sqrt().unsqueeze(-1) if whiten else V


def redistributed(found: Mapping[str, Components], rank: int) -> dict[str, int]:
    """Return how many of each module's components are among the ``rank * modules`` that explain most."""
    ranked = sorted(((share, path) for path, each in found.items() for share in each.shares()), key=lambda one: -one[0])
    best = [path for _, path in ranked[: rank * len(found)]]
    return {path: best.count(path) for path in found}
