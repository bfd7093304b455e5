"""peft's LoRA of a grouped convolution, whose A reads the channels of all groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.author import Operator, Site
from peftcore.errors import UnsupportedSite


class AcrossGroups(Operator):
    """The update of a grouped convolution from the channels of all groups: A ``[rank, in * groups, *kernel]``, and B
    ``[out, rank / groups]``, which mixes inside each group. No grouped weight computes that, so it does not merge."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site)
        self.groups, self.dropout, self.scale = groups_of(site), dropout, scale
        if rank % self.groups:
            raise UnsupportedSite(f"{site.path} has {self.groups} groups, which a rank of {rank} does not fill")
        inputs = (site.in_features * self.groups, *site.kernel)
        bound = 1 / math.sqrt(math.prod(inputs))
        self.A = nn.Parameter(torch.empty(rank, *inputs).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank // self.groups))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., in, *size]
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        inside = torch.block_diag(*B.unflatten(0, (self.groups, -1)))  # [out, rank]
        return y + self.layer.mix(self.scale * self.layer.apply(dropped, A), inside)


def groups_of(site: Site) -> int:
    """Return the number of groups of a convolution; 1 for other layers, transposed convolutions and padding modes other
    than zeros."""
    plain = isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and site.module.padding_mode == "zeros"
    return site.module.groups if plain else 1


def around(site: Site) -> Site:
    """Return the layer of a site as a place for an operator around it."""
    return replace(site, form="activation")


def across_count(site: Site, rank: int) -> int:
    """Return the number of parameters of a grouped convolution."""
    groups = groups_of(site)
    return rank * groups * site.in_features * math.prod(site.kernel) + rank // groups * site.out_features
