"""DyT, Dynamic Tuning: a dispatcher chooses the tokens that go through a feed-forward, in parallel with an adapter for
all. Zhao et al. 2024, arXiv 2403.11808 (code: NUS-HPC-AI-Lab/Dynamic-Tuning).

Equation:
    y_i = x_i + m_i MLP(LN(x_i)) + s (W_up relu(W_down x_i + b_down) + b_up),   W_down [r, d],  W_up [d, r]
    m_i = 1 if sigmoid(w . x_i + b) > 1/2 else 0,   w [d];   in training sigmoid((w . x_i + b + g - g') / temperature)
    loss = L(p) + rate_weight (mean m - rate)^2 + complete (L(q) + KL(q | p))

g and g' are draws from Gumbel's distribution, and the gradient of m is that of the sigmoid. x is the residual stream in
front of the feed-forward's norm. The feed-forward always computes the class token and all other tokens in front of a
picture's patches (`prefix_tokens`). The mean of m covers all blocks, pictures and tokens except these tokens and
padding. p is the model's prediction, and q its prediction in a second pass with m = 1 everywhere and new dropout; KL
passes no gradient to q.

L is the cross-entropy of classes. It needs the logits that the model returns (a field `logits`, or the tensor itself,
with classes in dimension 1), and labels, passed to the model or by ``peftcore.call(model, labels=...)``; without labels
set `complete` to 0. The second pass doubles the time of training. Losses that the model does not return are available
from `injection.losses()`.

In training the feed-forward computes all tokens, and its output for tokens that are not chosen is multiplied by zero.
In evaluation with `skip`, it computes only the chosen tokens, which makes the model faster.

Parameters: 2 d r + r + d of the adapter and d + 1 of the dispatcher, per block.

Start: W_down starts from a Kaiming-uniform draw, w from N(0, 0.02), all else at zero: the feed-forward gets about half
of the tokens. With ``init_std=0, init_bias=10`` all tokens are chosen, and a fresh adapter is the identity.

Differs from the authors' code: The paper's mixture of adapters is neither in the authors' code nor here.

Use it: `peftcore.apply(model, "dyt")`, to make a ViT faster that has to keep all its tokens; not where the feed-forward
may compute all tokens (`adaptformer` has the same adapter), nor where tokens are to skip attention too (`coda`). It
cannot be merged.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    branch,
)
from peftcore.errors import TrainingError
from peftcore_vision.dyt.dispatcher import Taps, skipping_site

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
    """Dropout probability of the bottleneck's activations."""
    rate: Portion = 0.5
    """The share of tokens that the feed-forwards should compute."""
    rate_weight: NonNegativeFloat = 2.0
    """Weight of the loss that keeps the share of chosen tokens near `rate`."""
    complete: NonNegativeFloat = 1.0
    """Weight of the two losses of the second pass, in which no token skips; 0 leaves this pass out."""
    temperature: PositiveFloat = 5.0
    """Divisor of the gate's logits and draws in training."""
    threshold: Portion = 0.5
    """Probability above which a token is chosen."""
    skip: bool = False
    """Compute only the chosen tokens in evaluation without gradients; each row is padded to the largest number of
    chosen tokens of a row. This needs feed-forwards that process each token by itself, and only one adapter at each of
    them. In routes and under torch.compile all tokens are computed."""
    prefix_tokens: NonNegativeInt | None = None
    """Number of tokens at the start of a sequence that the feed-forward always computes. None: all tokens in front of a
    picture's patches."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of w at the start."""
    init_bias: FiniteFloat = 0.0
    """The dispatcher's bias b at the start; if w starts at zero and b is positive, all tokens are chosen, and a fresh
    adapter is an exact identity."""


def loss_of_share(taps: Taps, share: float) -> Tensor | None:
    """Return ``(mean gate - share)^2`` from the gates that the blocks recorded, and clear the record. Return None if no
    gates were recorded."""
    counts = taps.counts.take()
    if not counts:
        return None
    through, tokens = (torch.stack(each).sum() for each in zip(*counts, strict=True))
    return (through / tokens - share).square()


def loss_of_everyone(taps: Taps, output: Any, call: ForwardContext) -> Tensor:
    """Return the loss ``L(q) + KL(q | p)``. p is the prediction in `output`; q is the prediction of a second forward
    pass in which no token skips the feed-forwards.

    Raises:
        TrainingError: the model does not return logits, or labels whose shape fits the logits are missing.
    """
    given = call.inputs.get("labels")
    labels: Any = call.context.get("labels") if given is None else given
    p, q = _logits_of(output, labels), _logits_of(call.again({taps.everyone: True}), labels)
    target = q.detach().log_softmax(1)
    apart = (target.exp() * (target - p.log_softmax(1))).sum(1).mean()
    return F.cross_entropy(q, labels) + apart


def _logits_of(output: Any, labels: Any) -> Tensor:
    """Return the class logits in a model's output, ``[rows, classes]`` or ``[rows, classes, high, wide]``, in float32
    at least."""
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and logits.dim() in (2, 4)
        and labels.shape == (logits if labels.is_floating_point() else logits[:, 0]).shape
    ):
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
    raise TrainingError(
        "dyt also trains the model with all tokens, and needs its logits [rows, classes] (or of each pixel) and "
        "labels: pass labels to the model or by peftcore.call(model, labels=...), or set complete=0"
    )


class DyT(Method):
    """Feed-forwards for chosen tokens only, in parallel with adapters for all tokens."""

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
            self.taps.graft(surgeon, skipping_site(surgeon, place) if skips else place, config)

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
