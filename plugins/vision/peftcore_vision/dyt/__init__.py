"""DyT, Dynamic Tuning: a dispatcher chooses the tokens that go through a feed-forward, beside an adapter for all.
Zhao et al. 2024, arXiv 2403.11808 (code: NUS-HPC-AI-Lab/Dynamic-Tuning).

Equation:
    y_i = x_i + m_i MLP(LN(x_i)) + s (W_up relu(W_down x_i + b_down) + b_up),   W_down [r, d],  W_up [d, r]
    m_i = 1 if sigmoid(w . x_i + b) > 1/2 else 0,   w [d];   in training sigmoid((w . x_i + b + g - g') / temperature)
    loss = L(p) + rate_weight (mean m - rate)^2 + complete (L(q) + KL(q | p))

g and g' are draws of Gumbel's distribution, and gradients those of the sigmoid. x is the stream in front of the
feed-forward's norm. The mean of m is over all blocks, pictures and tokens but the class token, which the feed-forward
always computes, like all tokens in front of a picture's patches (`prefix_tokens`); padding does not count. q is the
model's prediction in a second pass with m = 1 everywhere, dropout drawn anew; KL passes no gradient to it.

L is the cross-entropy of classes. It needs the logits that the model returns (a field `logits`, or the tensor itself,
classes in dimension 1) and the labels: those that the model is given, or ``peftcore.call(model, labels=...)``; without
them `complete` is to be 0. The second pass doubles the time of training. Losses that the model does not return are
available from `injection.losses()`.

In training all tokens are computed, and those that go by are multiplied by zero. With `skip` they are not computed in
evaluation, which makes it fast.

Parameters: 2 d r + r + d of the adapter and d + 1 of the dispatcher, a block.

Start: W_down starts from a Kaiming-uniform draw, w from N(0, 0.02), all else at zero: about half of the tokens go
through. ``init_std=0, init_bias=10`` lets all tokens through: the identity.

Differs from the authors' code: The mixture of adapters of the paper is not in the code, and not here.

Use it: `peftcore.apply(model, "dyt")`, where a ViT has to be faster than it was, and keep all its tokens; not where all
may go through (`adaptformer` has the same adapter), nor where tokens are to be left out of attention too (`coda`). It
cannot be merged.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    OUTPUTS,
    AppliedMethod,
    BranchSite,
    ForwardContext,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Surgeon,
    Tags,
    Tap,
    branch,
)
from peftcore_vision.dyt.dispatch import Taps, loss_of_everyone, loss_of_share
from peftcore_vision.dyt.skipped import Skipping, skipping_site

Portion = Annotated[float, Field(ge=0.0, le=1.0)]


class DyTConfig(MethodConfig):
    """Options of Dynamic Tuning."""

    overridable = (
        "bottleneck",
        "scale",
        "dropout",
        "temperature",
        "threshold",
        "skip",
        "prefix_tokens",
        "init_std",
        "init_bias",
    )

    method: Literal["dyt"] = "dyt"
    bottleneck: PositiveInt = 64
    """Width r of the adapter."""
    scale: PositiveFloat = 0.1
    """The factor s in front of the adapter."""
    dropout: Share = 0.1
    """Probability with which the bottleneck's numbers are dropped in training."""
    rate: Portion = 0.5
    """The share of tokens that is to go through the feed-forwards."""
    rate_weight: NonNegativeFloat = 2.0
    """Weight of the loss that holds this share."""
    complete: NonNegativeFloat = 1.0
    """Weight of the two losses of the pass in which all tokens go through; 0 runs the model once."""
    temperature: PositiveFloat = 5.0
    """Divisor of logits and draws in training."""
    threshold: Portion = 0.5
    """Probability above which a token passes through."""
    skip: bool = False
    """In evaluation without gradients compute the chosen tokens alone, of each row as many as the row with the most
    has. For feed-forwards that treat each token by itself, and for one adapter at each; in routes and under
    torch.compile all are computed."""
    prefix_tokens: NonNegativeInt | None = None
    """How many tokens in front always go through; None: those in front of a picture's patches."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of w at the start."""
    init_bias: FiniteFloat = 0.0
    """b at the start; where w starts at zero and b above it, all tokens go through: an exact identity."""


class DyTOperator(Skipping):
    """The dispatcher of one feed-forward, and the bottleneck in parallel with it."""

    padded = frozenset({"down.weight", "down.bias", "up.weight"})

    def __init__(self, site: BranchSite, config: DyTConfig, taps: Taps, lie: Tap) -> None:
        super().__init__(site, config, taps, lie)
        self.down = nn.Linear(site.width, config.bottleneck)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.bottleneck, site.out_features)
        self.scale = config.scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def beside(self, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = self.cast(x, self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        return self.scale * F.linear(self.dropout(torch.relu(F.linear(x, down, down_bias))), up, up_bias)


class DyT(Method):
    """Feed-forwards of chosen tokens only, in parallel with adapters of all tokens."""

    name = "dyt"
    Config = DyTConfig
    tags = Tags(
        category="vision",
        paper="2403.11808",
        identity_at_init=False,
        identity_options={"init_std": 0.0, "init_bias": 10.0},
        random=True,
        exact_gradient=False,
        reentrant=False,
    )
    learning_rate = LearningRate(
        4e-3, "NUS-HPC-AI-Lab/Dynamic-Tuning@d1744f0, train_IN21K.sh", on="ViT-B/16, CIFAR-100, batches of 1,024"
    )
    target = ("mlp.output",)
    alternatives = OUTPUTS

    def inject(self, model: nn.Module, config: DyTConfig, surgeon: Surgeon) -> None:
        self.taps = Taps()
        for site in surgeon.sites():
            place = branch(surgeon, site, before_norm=True, adds=False)
            skips = config.at(site.path).skip
            self.taps.graft(surgeon, skipping_site(surgeon, place) if skips else place, DyTOperator, config)

    def output_loss(self, injection: AppliedMethod, output: Any, call: ForwardContext) -> Tensor | None:
        config = injection.config
        weighed = [(config.rate_weight, loss_of_share(self.taps, config.rate))]
        if config.complete:
            weighed.append((config.complete, loss_of_everyone(self.taps, output, call)))
        losses = [weight * loss for weight, loss in weighed if loss is not None]
        return torch.stack(losses).sum() if losses else None

    @staticmethod
    def parameter_count(site: BranchSite, config: DyTConfig) -> int:
        bottleneck = (site.width + site.out_features) * config.bottleneck + config.bottleneck + site.out_features
        return bottleneck + site.width + 1
