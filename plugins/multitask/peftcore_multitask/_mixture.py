"""Low-rank experts of one module, with gates for each token or task, and the loss that balances the experts.

    y = W x + b + s sum_e g_e B_e A_e dropout(x)

Each expert has separate factors A_e [rank, in] and B_e [out, rank] and a separate dropout of its inputs; s is a number.
In evaluation, or without dropout, all A_e are applied in one matrix product and all B_e in another one. The gates scale
the result of the first product.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftcore.author import Router, Site, Tap, by_row, forward_context
from peftcore.errors import UnsupportedSite
from peftcore_multitask._skills import factors


class ExpertsOperator(Router):
    """The experts of one site; subclasses compute the gates."""

    stackable = True

    def __init__(self, site: Site, experts: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(site)
        if dropout and self.layer.one_hot:
            raise UnsupportedSite(
                f"{site.path} reads token ids, which dropout cannot act on; use dropout=0 or exclude it"
            )
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        self.A, self.B = factors(site, (experts, rank, site.in_features), (experts, site.out_features, rank),
                                 site.in_features)  # fmt: skip

    def start_normal(self, std: float) -> None:
        """Initialize all A from a normal distribution with standard deviation `std`. At embeddings nothing changes: A
        is zero there."""
        if not self.layer.one_hot:
            nn.init.normal_(self.A, std=std)

    def update(self, call: Callable[..., Tensor], x: Tensor, gates: Tensor) -> Tensor:
        """Return the module's output with the updates of all experts. The channels of `gates` are the experts; the
        other dimensions are broadcast to those of the output."""
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


def leave_counts(tap: Tap, group: str, picks: Tensor, probabilities: Tensor) -> None:
    """Store statistics for a balancing loss, which `imbalance` computes after the forward.

    Args:
        tap: stores one entry for each router: its group, and a tensor with the sums of `picks` and of `probabilities`
            over all tokens except padding, followed by the number of these tokens.
        group: the name of the group of routers that are balanced together.
        picks: 1 for each expert that is chosen for a token, else 0 ``[rows, tokens, experts]``.
        probabilities: the softmax from which the experts were chosen, in the same shape.
    """
    both, counts, _ = by_row(torch.cat([picks, probabilities, torch.ones_like(picks[..., :1])], -1))
    sums = (both if counts is None else both * counts.unsqueeze(-1)).sum((0, 1))
    running = forward_context()
    running.check_loss_learns()
    if not running.repeating:
        tap.put([*(tap.take() or ()), (group, sums)])


def imbalance(tap: Tap) -> Tensor | None:
    """Return the sum over groups of ``experts * sum_e F_e P_e``, from the statistics of `leave_counts`: F_e is the
    number of picks of e per token and P_e the mean of its probability. Return None without statistics."""
    groups: dict[str, list[Tensor]] = {}
    for group, sums in tap.take() or ():
        groups.setdefault(group, []).append(sums)
    losses = []
    for each in groups.values():
        *both, tokens = torch.stack(each).sum(0).unbind()
        picks, probabilities = torch.stack(both).view(2, -1) / tokens
        losses.append(len(picks) * (picks * probabilities).sum())
    return torch.stack(losses).sum() if losses else None


def with_one_input(site: Site) -> Site:
    """Return the site, after a check that its module has one input, the residual stream.

    Raises:
        UnsupportedSite: the module's forward has more inputs, such as a residual.
    """
    asked = inspect.signature(site.module.forward).parameters.values()
    if sum(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in asked) > 1:
        raise UnsupportedSite(
            f"{site.path} is called with more inputs than the stream, and the mixture cannot mix the others; exclude it"
        )
    return site
