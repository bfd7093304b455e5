"""AdaMix: several copies of an adapter's two maps; in training each forward uses randomly drawn copies.   Wang et al.
2022, arXiv 2205.12410 (microsoft/AdaMix).

Equation:
    training      y = h + U_j gelu(D_i h + b_i) + c_j,   i and j drawn evenly, for each adapter and forward anew
    evaluation    y = h + U gelu(D h + b) + c,           each the mean of its copies
    loss          L(p) + w (KL(p | q) + KL(q | p)) / 2   with q of a second pass, which draws (and drops) anew

h is the feed-forward's output before it is added to the residual stream: the output of the last matrix, in front of the
host's dropout, as in the code for RoBERTa and for GPT-2 (`joins`). In the code's scripts only the down map has copies,
and all copies share one up map (`shared`). Draws use torch's generator of the device. Copies that were not drawn have
gradients of zero, so optimizers with momentum still move them, as in the authors' code.

The loss needs the logits ``[rows, classes]`` or ``[rows, tokens, classes]`` of a model's output: its field `logits`,
the output itself if it is a tensor, or the first entry of a tuple after the loss. It is a mean over rows, or over
tokens that are not padding; the left arguments of both KL terms are detached. In a route the loss covers only the rows
of its adapter. If the model does not return the loss, `injection.losses()` does. The second pass doubles the time and
the memory of training.

Parameters: M (d r + r) + d r + d per adapter; evaluation uses only the means, 2 d r + r + d; without `shared`, M times
both maps.

Start: Matrices from N(0, 0.02) and biases at zero, with a separate draw for each copy: the authors' code first copies
one map, but then the model initializes all its linear layers again. The start is near the identity; ``up_init_std=0``
makes it an exact identity.

Differs from the authors' code: Their loss for GPT-2 is over tokens with a label, and 100 times as large; here it is a
mean over tokens that are not padding. Their mixture of LoRAs is not available.

Use it: `peftcore.apply(model, "adamix")`, where a bottleneck adapter of this size learns too little, and evaluation
must not cost more; not where training time counts: `houlsby_adapter` takes half the time, and `adapter_soup` averages
adapters that were trained separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    OUTPUTS,
    AppliedMethod,
    AtBranchEnd,
    ForwardContext,
    Joins,
    LearningRate,
    Method,
    MethodConfig,
    Site,
    Surgeon,
    Tags,
    branch_end,
    by_row,
)
from peftcore.errors import TrainingError


class AdaMixConfig(MethodConfig):
    """Options of AdaMix."""

    method: Literal["adamix"] = "adamix"
    experts: PositiveInt = 4
    """Number M of copies of each map that is not shared."""
    bottleneck: PositiveInt = 16
    """Width r of the bottleneck."""
    shared: Literal["up", "down"] | None = "up"
    """The map that all copies of the other map share."""
    consistency: NonNegativeFloat = 1.0
    """Weight w of the loss between two passes; 0 runs the model once."""
    routing: Literal["random", "mean"] = "random"
    """The maps used in training: randomly drawn copies, or the mean of all copies."""
    joins: Joins = "matrix"
    """Where the adapter reads and adds. "matrix": at the output of the feed-forward's last matrix. "stream": after the
    host's dropout, layer scale and stochastic depth on that output."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of the down maps at the start."""
    up_init_std: NonNegativeFloat = 0.02
    """Standard deviation of the up maps at the start; 0 makes a fresh adapter an exact identity."""


def copies(config: AdaMixConfig) -> tuple[int, int]:
    """Return the numbers of down maps and of up maps."""
    down, up = (1 if config.shared == name else config.experts for name in ("down", "up"))
    return down, up


class AdaMixOperator(AtBranchEnd):
    """The copies of the adapter after one feed-forward."""

    def __init__(self, site: Site, config: AdaMixConfig) -> None:
        super().__init__(site)
        (downs, ups), d, r = copies(config), site.out_features, config.bottleneck
        self.down = nn.Parameter(torch.randn(downs, r, d) * config.init_std)
        self.down_bias = nn.Parameter(torch.zeros(downs, r))
        self.up = nn.Parameter(torch.randn(ups, d, r) * config.up_init_std)
        self.up_bias = nn.Parameter(torch.zeros(ups, d))
        self.noise = 1.0 if config.routing == "random" else 0.0

    def adapt(self, h: Tensor) -> Tensor:
        low = F.gelu(F.linear(self.layer.channels_last(h), *self.cast(h, *self.chosen(self.down, self.down_bias))))
        return h + self.layer.channels_back(F.linear(low, *self.cast(h, *self.chosen(self.up, self.up_bias))))

    def chosen(self, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matrix and the bias of one copy, or the means of all copies."""
        if len(weights) == 1 or not (self.training and self.noise):
            return weights.mean(0), biases.mean(0)
        index = torch.randint(len(weights), (1,), device=weights.device)
        return weights.index_select(0, index)[0], biases.index_select(0, index)[0]


class AdaMix(Method):
    """Adapters after feed-forwards, with several copies that are drawn in training and averaged in evaluation."""

    name = "adamix"
    Config = AdaMixConfig
    tags = Tags(
        category="hybrid",
        paper="2205.12410",
        identity_at_init=False,
        identity_options={"up_init_std": 0.0},
        random=True,
    )
    learning_rate = LearningRate(
        3e-4, "microsoft/AdaMix@d361e9d, roberta_large_mnli_expert_soup.sh", on="RoBERTa-large, MNLI"
    )
    target = ("mlp.output",)
    alternatives = OUTPUTS

    def inject(self, model: nn.Module, config: AdaMixConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            place = branch_end(surgeon, site, config.at(site.path).joins)
            surgeon.graft(place, AdaMixOperator, config, place.places)

    def output_loss(self, injection: AppliedMethod, output: Any, call: ForwardContext) -> Tensor | None:
        weight = injection.config.consistency
        if not weight:
            return None
        labelled = call.inputs.get("labels") is not None
        one, other = logits_of(output, labelled), logits_of(call.again(), labelled)
        differences, counts, _ = by_row(symmetric_kl(one, other).unsqueeze(-1))  # [rows, tokens or 1, 1]
        counted = torch.ones_like(differences[..., 0]) if counts is None else counts.to(differences.dtype)
        mean: Tensor = (differences[..., 0] * counted).sum() / counted.sum().clamp(min=1)
        return weight * mean

    @staticmethod
    def parameter_count(site: Site, config: AdaMixConfig) -> int:
        (downs, ups), d, r = copies(config), site.out_features, config.bottleneck
        return downs * (d * r + r) + ups * (d * r + d)


def logits_of(output: Any, labelled: bool) -> Tensor:
    """Return the logits ``[rows, classes]`` or ``[rows, tokens, classes]`` from a model's output.

    Args:
        output: the model's output.
        labelled: True if the model got labels, so that a tuple begins with its loss.

    Raises:
        TrainingError: the output lacks logits of these shapes.
    """
    found = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(found, tuple) and len(found) > labelled:
        found = found[labelled]
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        raise TrainingError(
            "adamix compares the logits [rows, classes] or [rows, tokens, classes] of two passes, but this model "
            f"returns {type(output).__name__} without them: train the model that has the head, or set consistency=0"
        )
    return found


def symmetric_kl(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean of the two KL divergences between logits ``[..., classes]``. The result is ``[...]``, in float32
    at least."""
    precise = torch.promote_types(one.dtype, torch.float32)
    p, q = one.to(precise).log_softmax(-1), other.to(precise).log_softmax(-1)
    return 0.5 * (_kl(p.detach(), q) + _kl(q.detach(), p)).sum(-1)


def _kl(target: Tensor, log_probabilities: Tensor) -> Tensor:
    return target.exp() * (target - log_probabilities)
