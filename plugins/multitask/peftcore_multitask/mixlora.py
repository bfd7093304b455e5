"""MixLoRA: a feed-forward becomes a sparse mixture of itself with low-rank updates.   Li et al. 2024, arXiv 2404.15159
(TUDB-Labs/MixLoRA).

Equation:
    y = sum_{e in top} g_e FFN_e(x),   g = p / sum_{top} p,   p = softmax(W_r x),   top: the `top_k` largest p
    loss = balance * experts * sum_e F_e P_e

FFN_e is the feed-forward of the model with an update of each of its matrices, W + s B_e A_e dropout, s = alpha / rank.
F_e is the number of choices of e per token, and P_e is the mean of p_e. Both are taken over the tokens of all layers
except padding, as in the authors' trainer (TUDB-Labs/MoE-PEFT). Other target modules, such as those of attention, have
one update each, without a router. W_r [experts, d] is without bias. The router computes in float32 at least.

The feed-forward must be a separate module, and the adapter cannot be limited to some rows of a batch. Parameters:
experts * d per feed-forward, experts * rank * (in + out) per matrix of a feed-forward, and rank * (in + out) per other
matrix.

Start: W_r from N(0, 0.02), A uniform in +-1/sqrt(in), B at zero. A fresh adapter is the identity, up to rounding.

Differs from the authors' code: The authors gather the tokens of each expert. Here the feed-forward runs once on `top_k`
copies of its input. Each matrix applies all A in one product, and each copy keeps only the ranks of its expert, so no
token is dropped. Near a tie, rounding may choose another expert. The authors' noise on the router's inputs, 0 by
default, is left out.

Use it: `peftcore.apply(model, "mixlora")`, for several tasks at once with room for a second forward of the
feed-forward; `loramoe` costs a fraction of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    FeedForwardSite,
    ForwardContext,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Router,
    Share,
    Site,
    Surgeon,
    Tags,
    Tap,
    feed_forward_around,
    full_precision,
)
from peftcore.errors import MissingContext, SequenceError, UnsupportedSite
from peftcore_multitask._mixture import imbalance, leave_counts, with_one_input
from peftcore_multitask._skills import factors


class MixLoRAConfig(MethodConfig):
    """Options of MixLoRA."""

    method: Literal["mixlora"] = "mixlora"
    experts: PositiveInt = 8
    """Number of experts of a feed-forward."""
    top_k: PositiveInt = 2
    """Number of experts that act on a token."""
    rank: PositiveInt = 8
    """Rank of each update."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.05
    """Dropout probability of the inputs of each update."""
    balance: NonNegativeFloat = 0.01
    """Factor of the balancing loss."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is more than the {self.experts} experts")
        return self


@dataclass(frozen=True, eq=False)
class MatrixSite(Site):
    """A matrix that gets updates."""

    experts: int = 1
    """Number of updates: the number of experts for a matrix of a feed-forward, else 1."""


class RouterOperator(Router):
    """Runs a feed-forward on `top_k` copies of each token, one for each chosen expert."""

    changes_inputs = True

    def __init__(self, site: FeedForwardSite, config: MixLoRAConfig, chosen: Tap, balances: Tap) -> None:
        super().__init__(with_one_input(site))
        self.top_k, self.balance, self.chosen, self.balances = config.top_k, config.balance, chosen, balances
        self.router = nn.Parameter(torch.randn(config.experts, site.width) * 0.02)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., d]
        precise = torch.promote_types(self.router.dtype, torch.float32)
        with full_precision(x):
            probabilities = (x.to(precise) @ self.router.to(precise).T).softmax(-1)  # [..., experts]
        largest = probabilities.topk(self.top_k, -1)
        weights = largest.values / largest.values.sum(-1, keepdim=True)
        picks = nn.functional.one_hot(largest.indices, len(self.router)).to(precise)  # [..., top_k, experts]
        self.noted((picks * weights.unsqueeze(-1)).sum(-2))
        if self.training and self.balance:
            leave_counts(self.balances, "", picks.sum(-2), probabilities)
        self.chosen.take()
        self.chosen.put(picks.movedim(-2, 0).flatten(0, 1) if x.dim() > 1 else picks)  # as the copies lie
        copies = x.expand(self.top_k, *x.shape).contiguous()  # those of a single row would be one
        y = call(copies.flatten(0, 1) if x.dim() > 1 else copies).reshape(self.top_k, *x.shape[:-1], -1)
        self.chosen.take()
        return (y * weights.movedim(-1, 0).unsqueeze(-1).to(y.dtype)).sum(0)


class UpdateOperator(Operator):
    """The updates of one matrix. A matrix of a feed-forward has one update for each expert, and each token gets the
    update of its expert. Other matrices have a single update."""

    def __init__(self, site: MatrixSite, config: MixLoRAConfig, chosen: Tap | None) -> None:
        super().__init__(site)
        if not (self.layer.called and self.layer.of_vectors) or site.batch:
            raise UnsupportedSite(f"{site.path} is not a linear layer; exclude it")
        experts = site.experts
        self.chosen, self.scale, self.dropout = chosen, config.alpha / config.rank, nn.Dropout(config.dropout)
        inputs, outputs = site.in_features, site.out_features
        self.A, self.B = factors(site, (experts, config.rank, inputs), (experts, outputs, config.rank), inputs)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        low = self.layer.apply(self.dropout(x), A.flatten(0, 1))  # [..., experts * rank]
        if self.chosen is not None:
            picks = self.chosen.get()
            if picks is None:
                raise MissingContext(
                    "a matrix of a feed-forward was called by itself, so no router chose its experts; call the whole "
                    "feed-forward"
                )
            low = low * self.kept(picks, low)
        return self.layer.add(y, low, B.transpose(0, 1).flatten(1), self.scale)

    def kept(self, picks: Tensor, low: Tensor) -> Tensor:
        """Return a mask in the shape of `low`: 1 for the ranks of each copy's expert, 0 for all other ranks. Raises
        SequenceError if the matrix gets other tokens than its feed-forward."""
        ranks = picks.to(low.dtype).flatten(0, -2).repeat_interleave(self.A.shape[1], -1)
        times, rest = divmod(low.numel(), ranks.numel())
        if rest:
            raise SequenceError(
                f"a matrix got {tuple(low.shape)}, which are other tokens than those of its feed-forward; exclude it"
            )
        return ranks.repeat(times, 1).view(low.shape)  # another router inside this one makes copies of the copies


class MixLoRA(Method):
    """Sparse mixtures of feed-forwards that differ by low-rank updates, and LoRA at other matrices."""

    name = "mixlora"
    Config = MixLoRAConfig
    tags = Tags(category="multitask", paper="2404.15159", per_row=False, random=True, reentrant=False, routes="token")
    learning_rate = LearningRate(1e-5, "TUDB-Labs/MixLoRA@d59d09b, README.md", on="alpaca-cleaned")
    target = ("attn.q", "attn.v", "mlp.gate", "mlp.up", "mlp.down")

    def inject(self, model: nn.Module, config: MixLoRAConfig, surgeon: Surgeon) -> None:
        taps: dict[str, Tap] = {}
        self.balances = Tap()
        for site in surgeon.sites():
            whole = feed_forward_around(surgeon, site)
            if whole is not None and whole.path not in taps:
                taps[whole.path] = Tap()
                surgeon.graft(whole, RouterOperator, config, chosen=taps[whole.path], balances=self.balances)
            matrix = MatrixSite(**vars(site), experts=1 if whole is None else config.experts)
            chosen = None if whole is None else taps[whole.path]
            surgeon.graft(matrix, UpdateOperator, config, chosen=chosen)
        if not taps:
            raise UnsupportedSite(
                "no target is a matrix of a feed-forward, so there is nothing to route; set other targets, or use lora"
            )

    def output_loss(self, injection: AppliedMethod, output: Any, call: ForwardContext) -> Tensor | None:
        loss = imbalance(self.balances)
        return None if loss is None else injection.config.balance * loss

    @staticmethod
    def parameter_count(site: FeedForwardSite | MatrixSite, config: MixLoRAConfig) -> int:
        if isinstance(site, FeedForwardSite):
            return config.experts * site.width
        return site.experts * config.rank * (site.in_features + site.out_features)
