"""For the check of packed bases a method that fails it, and it only."""

from __future__ import annotations

from collections.abc import Callable

from mutant_base import Entry, Small, mutant
from torch import Tensor


class KnowsTheFormat(Small):
    """Twice its update where the base is packed."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = super().forward(call, x)
        return 2 * y - call(x) if self.layer.packed else y


MUTANTS: dict[str, Entry] = {"packed_bases_are_like_dense_ones": (mutant("knows_the_format", KnowsTheFormat), "llama")}
