"""AdaLoRA: a low-rank update whose ranks are chosen during training.   Zhang et al. 2023, arXiv 2303.10512.

Equation:
    y = W x + b + s B diag(E) A dropout(x),   s = alpha / (rank + 1e-5)

The term orthogonality * mean(||A A' - I||, ||B' B - I||) is added to the loss. The importance of a triple (a column of
B, an entry of E, a row of A) is S(E) + mean S(A) + mean S(B). S is the product of two moving averages: of |w dw|, and
of its fluctuation. From step `warmup` until the last `final` steps, the number of active triples of all sites decreases
as a cubic, from all triples to `target_rank` a site. Every `interval` steps, E is set to zero in the least important
triples, which may be activated again later.

Parameters: rank * (in * kernel + out + 1) a site, times the number of experts.

Start: A and B from N(0, 0.02), E at zero: the identity.

Differs from the authors' code: The authors' code was not compared; no difference from peft is known.

Use it: `peftcore.apply(model, "adalora")`, to distribute a small number of ranks over many sites if it is unknown which
sites are important.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, AppliedMethod, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore.errors import TrainingError
from peftcore_reparameterized._low_rank import LowRankOperator, low_rank_count


class AdaLoRAConfig(MethodConfig):
    """Options of AdaLoRA."""

    method: Literal["adalora"] = "adalora"
    rank: PositiveInt = 12
    """Initial rank of each update; 1.5 times `target_rank` is usual."""
    target_rank: PositiveInt = 8
    """Rank of the updates at the end, on average over the sites."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    warmup: NonNegativeInt = 0
    """Number of steps before ranks are reduced."""
    final: NonNegativeInt = 0
    """Number of final steps, in which the choice of triples does not change."""
    interval: PositiveInt = 1
    """Number of steps from one choice of triples to the next."""
    beta1: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.85
    """Decay of the moving average of the importance."""
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.85
    """Decay of the moving average of the importance's fluctuation."""
    orthogonality: NonNegativeFloat = 0.5
    """Weight of the orthogonality of A and B in the loss."""


class AdaLoRAOperator(LowRankOperator):
    """The update of one site in triples, and the moving averages of their importance."""

    chosen: Tensor
    """Whether a triple is active, ``[*batch, rank]``."""

    def __init__(self, site: Site, config: AdaLoRAConfig) -> None:
        super().__init__(site, config.dropout)
        self.scale = config.alpha / (config.rank + 1e-5)
        self.A = nn.Parameter(torch.randn(*site.batch, config.rank, site.in_features, *site.kernel) * 0.02)
        self.B = nn.Parameter(torch.randn(*site.batch, site.out_features, config.rank) * 0.02)
        self.E = nn.Parameter(torch.zeros(*site.batch, config.rank))
        for name, factor in list(self.named_parameters(recurse=False)):
            for statistic in ("importance", "fluctuation"):
                self.register_buffer(f"{statistic}_{name}", torch.zeros_like(factor), persistent=False)
        self.register_buffer("chosen", torch.ones_like(self.E, dtype=torch.bool), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A * self.E.view(*self.E.shape, *[1] * (self.A.dim() - self.E.dim())), self.B, self.scale

    def distances(self) -> Tensor:
        """Return the distances of A and B from orthogonal matrices: first for A of each expert, then for B, [2 *
        experts]."""
        grams = torch.stack([each @ each.mT for each in (self.A.flatten(self.E.dim()), self.B.mT)])
        return torch.linalg.matrix_norm(grams - torch.eye(grams.shape[-1]).to(grams)).flatten()

    def observe(self, config: AdaLoRAConfig) -> None:
        """Update the moving averages from the gradients."""
        for name in "ABE":
            weight = self.get_parameter(name)
            change = torch.zeros_like(weight) if weight.grad is None else (weight * weight.grad).abs()
            mean, spread = self.get_buffer(f"importance_{name}"), self.get_buffer(f"fluctuation_{name}")
            mean.mul_(config.beta1).add_(change, alpha=1 - config.beta1)
            spread.mul_(config.beta2).add_((change - mean).abs(), alpha=1 - config.beta2)

    def scores(self) -> Tensor:
        """Return the importance of each triple, [*batch, rank]."""
        A, B, E = (self.get_buffer(f"importance_{name}") * self.get_buffer(f"fluctuation_{name}") for name in "ABE")
        return E + A.flatten(self.E.dim()).mean(-1) + B.mean(-2)


class AdaLoRA(Method):
    """Low-rank adaptation with ranks that are chosen by importance."""

    name = "adalora"
    Config = AdaLoRAConfig
    tags = Tags("reparameterized", "2303.10512", mergeable=True, low_rank=True, scheduled=True)
    learning_rate = LearningRate(
        5e-4, "QingruZhang/AdaLoRA@d10f5eb, NLG_QA/scripts/run_bart_xsum.sh", on="BART-large, XSum"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: AdaLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, AdaLoRAOperator, config)

    def aux_loss(self, injection: AppliedMethod) -> Tensor | None:
        weight = injection.config.orthogonality
        return weight * torch.cat([each.distances() for each in _operators(injection)]).mean() if weight else None

    def check_steps(self, config: AdaLoRAConfig, total: int) -> None:
        if total - config.final <= config.warmup:
            raise TrainingError(
                f"adalora: warmup={config.warmup} and final={config.final} leave none of the {total} steps for "
                "reducing ranks; lower them"
            )

    @torch.no_grad()
    def on_step(self, injection: AppliedMethod, step: int, total: int) -> None:
        config, operators, last = injection.config, _operators(injection), total - injection.config.final
        if step < last:
            for operator in operators:
                operator.observe(config)
        if step == last or (config.warmup < step < last and step % config.interval == 0):
            _choose(operators, config.target_rank, (1 - (step - config.warmup) / (last - config.warmup)) ** 3)
        elif step <= last:
            return
        for operator in operators:
            operator.E.masked_fill_(~operator.chosen, 0.0)

    @staticmethod
    def parameter_count(site: Site, config: AdaLoRAConfig) -> int:
        return low_rank_count(site, config.rank) + math.prod(site.batch) * config.rank


def _operators(injection: AppliedMethod) -> list[AdaLoRAOperator]:
    return [operator for operator in injection.operators.values() if isinstance(operator, AdaLoRAOperator)]


def _choose(operators: list[AdaLoRAOperator], target: int, share: float) -> None:
    """Mark the most important triples of all sites as chosen. Their number is the target, plus `share` of the triples
    beyond it."""
    scores = [operator.scores() for operator in operators]
    every, target = torch.cat([s.flatten() for s in scores]), target * sum(math.prod(s.shape[:-1]) for s in scores)
    dropped = len(every) - int((len(every) - target) * share + target)
    threshold = every.kthvalue(dropped).values if dropped > 0 else every.new_tensor(-math.inf)
    for operator, score in zip(operators, scores, strict=True):
        operator.chosen.copy_(score > threshold)
