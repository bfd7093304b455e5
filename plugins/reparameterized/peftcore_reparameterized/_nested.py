"""Low-rank factors whose first ranks are usable adapters by themselves, and a LoRA made from the first ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from peftcore import Injection, lora_of
from peftcore.author import AppliedMethod, Site
from peftcore.errors import ConfigError
from peftcore_reparameterized._low_rank import LowRankOperator, low_rank_factors


class NestedOperator(LowRankOperator):
    """The factors of one site: at each rank that blocks of rows make up, the update is ``alpha / n B[:, :n] A[:n]``."""

    stackable = False

    def __init__(self, site: Site, rank: int, alpha: float, block_size: int, dropout: float) -> None:
        super().__init__(site, dropout)
        self.rank, self.alpha, self.block_size, self.scale = rank, alpha, block_size, alpha / rank
        self.A, self.B = low_rank_factors(site, rank)  # [*batch, rank, in, *kernel], [*batch, out, rank]

    def factors_of(self, rank: int, frozen: bool = False) -> tuple[Tensor, Tensor, float]:
        """Return the factors of that rank and the scale; with `frozen`, the rows below its block are detached.

        Raises:
            ConfigError: the rank is not a multiple of the block size up to the full rank.
        """
        if rank not in range(self.block_size, self.rank + 1, self.block_size):
            raise ConfigError(f"rank {rank} is none of {self.block_size}, {2 * self.block_size}, ..., {self.rank}")
        dim, below = self.layer.batch_dims, rank - self.block_size if frozen else 0
        A, B = self.A.narrow(dim, 0, rank), self.B.narrow(-1, 0, rank)
        parts = [each.split([below, rank - below], at) for each, at in ((A, dim), (B, -1))]
        A, B = (torch.cat([low.detach(), high], at) for (low, high), at in zip(parts, (dim, -1), strict=True))
        return A, B, self.alpha / rank

    def masked(self, rank: Tensor, frozen: bool) -> tuple[Tensor, Tensor, float]:
        """Return the same for a rank given as a tensor [], with zeros in the rows above it."""
        rank = rank.to(self.B.device)
        row = torch.arange(self.rank, device=self.B.device)
        trains = row >= rank - (self.block_size if frozen else self.rank)
        rows = trains.view(-1, *[1] * (self.A.dim() - self.layer.batch_dims - 1))
        A, B = torch.where(rows, self.A, self.A.detach()), torch.where(trains, self.B, self.B.detach())
        return A, B * ((row < rank) * (self.rank / rank)).to(B.dtype), self.scale


@torch.no_grad()
def make_lora(injection: AppliedMethod, rank: int, name: str = "lora") -> Injection:
    """Return the LoRA of the first ranks of a dylora: frozen, and active in place of the adapter, which stays.

    Raises:
        ConfigError: the injection is not a dylora, or lacks an adapter of that rank.
        PeftcoreError: as `peftcore.lora_of` does; nothing was changed.
    """
    found = [graft for graft in injection.grafts if isinstance(graft.operator, NestedOperator)]
    if not found:
        raise ConfigError("make_lora(injection, rank) is for a dylora")
    made = {graft.site.path: (graft.site, graft.operator.factors_of(rank)) for graft in found}
    return lora_of(injection.model, made, name, [injection.whole.name])
