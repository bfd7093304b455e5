"""Low-rank experts of one module, and the gates by which tokens or tasks share them.

    y = W x + b + s sum_e g_e B_e A_e dropout(x)

Each expert has factors A_e [rank, in] and B_e [out, rank] of its own and drops inputs for itself; s is a number. In
evaluation, or without dropout, all A are one product, whose ranks are weighed by the gates, and all B another one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftcore import Router, Site
from peftcore.errors import UnsupportedSite
from peftcore_multitask._skills import factors


class ExpertsOperator(Router):
    """The experts of one site; subclasses give the gates."""

    stackable = True

    def __init__(self, site: Site, experts: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(site)
        if dropout and self.layer.one_hot:
            raise UnsupportedSite(f"{site.path} gets ids, of which nothing can be dropped; use dropout=0 or exclude it")
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        self.A, self.B = factors(site, (experts, rank, site.in_features), (experts, site.out_features, rank),
                                 site.in_features)  # fmt: skip

    def start_normal(self, std: float) -> None:
        """Start all A from a normal distribution; at embeddings they stay zero, and B starts so."""
        if not self.layer.one_hot:
            nn.init.normal_(self.A, std=std)

    def update(self, call: Callable[..., Tensor], x: Tensor, gates: Tensor) -> Tensor:
        """Return the output, for gates whose channels are the experts: they broadcast to all places of the output."""
        y, channels, (experts, rank) = call(x), self.layer.channel_dim, self.A.shape[:2]
        A, B, gates = self.cast(y, self.A, self.B, gates)
        if self.training and self.dropout.p:
            lows = [self.layer.apply(self.dropout(x), each) for each in A]
            low = torch.cat(lows, channels)
        else:
            low = self.layer.apply(x, A.flatten(0, 1))  # channels: experts * rank
        shares = gates.repeat_interleave(rank, channels, output_size=experts * rank)
        return self.layer.add(y, low * shares, B.transpose(0, 1).flatten(1), self.scale)


def softmax_of(operator: Router, logits: Tensor) -> Tensor:
    """Return gates of logits whose channels are the experts, in float32 at least."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(operator.layer.channel_dim, dtype=precise)
