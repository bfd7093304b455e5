"""Trained differences at some places of a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peftcore.author import Site, WeightOperator
from peftcore.errors import UnsupportedSite


class EntriesOperator(WeightOperator):
    """Adds values to `count` entries of a tensor, or to all, and stores their indices: the first entries, until others
    are set.

    Raises:
        UnsupportedSite: the tensor has fewer entries, or none is to train.
    """

    index: Tensor

    def __init__(self, site: Site, count: int | None) -> None:
        super().__init__(site)
        self.size, count = site.numel, site.numel if count is None else count
        if not 0 < count <= self.size:
            raise UnsupportedSite(f"{site.path} has {self.size} entries, of which {count} cannot train")
        self.register_buffer("index", torch.arange(count))
        self.values = nn.Parameter(torch.zeros(count))

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        index = values.get("index")
        if index is not None and not (index.diff().gt(0).all() and int(index[0]) >= 0 and int(index[-1]) < self.size):
            yield f"index does not hold ascending places in {self.size} entries"

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.flatten()
        new = (flat.gather(0, self.index) + self.values).to(flat.dtype)
        return flat.scatter(0, self.index, new).view(weight.shape)
