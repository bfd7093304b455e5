"""LoReFT's intervention on hidden states: a linear map inside a subspace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import ACTIVATIONS, Checked, full_precision


class Intervention(Checked):
    """LoReFT's intervention: ``h'`` of ``h``."""

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        self.orthonormal, self.subtracts = config.kind == "loreft", config.kind != "direft"
        self.R = nn.Parameter(torch.empty(config.rank, width))
        self.learned = nn.Linear(width, config.rank)
        nn.init.orthogonal_(self.R) if self.orthonormal else nn.init.kaiming_uniform_(self.R, a=5**0.5)
        if config.identity:
            with torch.no_grad():
                self.learned.weight.copy_(self.R if self.subtracts else torch.zeros_like(self.R))
                self.learned.bias.zero_()
        self.activation = ACTIVATIONS[config.activation]() if config.activation else None
        self.dropout = nn.Dropout(config.dropout)

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        R = values.get("R")
        if self.orthonormal and R is not None:
            R = R.to(torch.promote_types(R.dtype, torch.float32))
            if torch.linalg.cholesky_ex(R @ R.mT).info:
                yield "R holds rows that span no subspace of their number"

    def rotation(self) -> Tensor:
        """Return R, with orthonormal rows where they have to be (in float32 at least: torch factors no half
        precision)."""
        if not self.orthonormal:
            return self.R
        with full_precision(self.R):
            R = self.R.to(torch.promote_types(self.R.dtype, torch.float32))
            factor: Tensor = torch.linalg.cholesky(R @ R.mT)  # [r, r], the identity where the rows are orthonormal
            return torch.linalg.solve_triangular(factor, R, upper=False)

    def forward(self, h: Tensor) -> Tensor:
        R, weight, bias = (each.to(h.dtype) for each in (self.rotation(), self.learned.weight, self.learned.bias))
        if self.activation is None:
            moved = nn.functional.linear(h, weight - R if self.subtracts else weight, bias)  # [..., r]
        else:
            moved = self.activation(nn.functional.linear(h, weight, bias)) - (h @ R.T if self.subtracts else 0)
        return self.dropout(h + moved @ R)
