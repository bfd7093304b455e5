"""LoRAMoE: low-rank experts that tokens share, and a loss that balances them.   Dou et al. 2023, arXiv 2312.09979
(Ablustrund/LoRAMoE).

Equation:
    y = W x + b + s sum_e g_e B_e A_e dropout(x),   g = softmax(W_g x),   s = alpha / rank
    loss = balance * var(z) / mean(z)^2,   z_ne = I_ne sum_t g_nte

A_e [rank, in] and W_g [experts, in] are without bias; the softmax is taken in float32 at least, of x without dropout.
The losses of all modules are added. z_ne is the sum of the gates of expert e over all tokens of row n except padding.
The variance is the unbiased one over all rows and experts. With tasks, the experts are split into consecutive groups,
one for each task. I is 1 + delta for the group of the row's task, and 1 - delta for all other groups. Calls pass the
task in training.

The gate depends on the token, so the method cannot be merged. Tensors that the model reads without calling their module
are refused.

Parameters: experts * rank * (in * kernel + out) + experts * in * kernel per site.

Start: A_e and W_g uniform in +-1/sqrt(in), B_e at zero. A fresh adapter is the identity.

Differs from the authors' code: The authors count padding in z. They have two tasks, and the first half of the experts
is for their type 1. Their script sets balance and delta to zero, like the defaults here.

Use it: `peftcore.apply(model, "loramoe", tasks=["skill", "knowledge"], balance=0.01, delta=0.1)`, where new data must
not degrade the model's knowledge: delta assigns experts to kinds of data. Not where only one kind of data is learned
(`lora` costs an eighth). With little memory use `hydralora`, whose experts share one A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, Share, Site, Surgeon, Tags, by_row, forward_context
from peftcore_multitask._mixture import ExpertsOperator, softmax_of
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count


class LoRAMoEConfig(TaskConfig):
    """Options of LoRAMoE."""

    method: Literal["loramoe"] = "loramoe"
    experts: PositiveInt = 8
    """Number of low-rank updates (experts) of a site."""
    rank: PositiveInt = 4
    """Rank of each low-rank update."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.05
    """Dropout probability of the inputs of each expert."""
    balance: NonNegativeFloat = 0.0
    """Factor of the balancing loss."""
    delta: Share = 0.0
    """Extra weight of the experts of a row's task in the balancing loss; above 0, calls in training must pass the
    task."""

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.delta and self.experts % task_count(self):
            raise ValueError(
                f"{self.experts} experts cannot be split equally among {task_count(self)} tasks; set experts to a "
                "multiple"
            )
        return self


class LoRAMoEOperator(ExpertsOperator):
    """The experts of one site, their gate and their balance."""

    def __init__(self, site: Site, config: LoRAMoEConfig) -> None:
        super().__init__(site, config.experts, config.rank, config.alpha / config.rank, config.dropout)
        bound = 1 / math.sqrt(site.in_features * math.prod(site.kernel))
        self.gate = nn.Parameter(torch.empty(config.experts, site.in_features, *site.kernel).uniform_(-bound, bound))
        self.balance, self.delta = config.balance, config.delta
        if self.balance:
            self.stackable = False  # the loss is of the rows of one adapter
        self.tasks = Tasks(site, config) if self.delta else None

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        channels = self.layer.channel_dim
        weight = self.gate if self.layer.one_hot else self.gate.to(x.dtype)
        gates = softmax_of(self, self.layer.apply(x, weight))
        self.noted(gates, channels)
        if self.training and self.balance:
            forward_context().add_loss(self.balance * self.imbalance(self.layer.channels_last(gates)), self)
        return self.update(call, x, gates)

    def imbalance(self, gates: Tensor) -> Tensor:
        """Return the squared coefficient of variation of the experts' shares, for gates ``[rows, tokens, experts]``."""
        shares, counts, _ = by_row(gates)
        got = (shares if counts is None else shares * counts.unsqueeze(-1)).sum(1)  # [rows, experts]
        if self.tasks is not None:
            got = got * self.tasks.of_rows(self.importance(got), len(got))
        return got.var() / (got.mean().square() + 1e-10) if got.numel() > 1 else got.sum() * 0

    def importance(self, like: Tensor) -> Tensor:
        """Return the factors I of the balancing loss, ``[tasks, experts]``."""
        assert self.tasks is not None, "delta is not zero"
        told = self.tasks.tasks
        count = told if isinstance(told, int) else len(told)
        eye = torch.eye(count, dtype=like.dtype, device=like.device).repeat_interleave(like.shape[-1] // count, 1)
        return 1 - self.delta + 2 * self.delta * eye


class LoRAMoE(Method):
    """Low-rank experts of the feed-forward, with a gate for each token.

    Example:
        injection = peftcore.apply(model, "loramoe", tasks=["skill", "knowledge"], balance=0.01, delta=0.1)
        peftcore.call(model, task="skill")  # or a list, one for each row; in evaluation no task is needed
    """

    name = "loramoe"
    Config = LoRAMoEConfig
    tags = Tags(category="multitask", paper="2312.09979", random=True, routes="token")
    learning_rate = LearningRate(2e-4, "Ablustrund/LoRAMoE@1177288, run_loramoe.sh", on="LLaMA 2 7B")
    target = ("mlp.gate", "mlp.up", "mlp.down")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: LoRAMoEConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, LoRAMoEOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: LoRAMoEConfig) -> int:
        inputs = site.in_features * math.prod(site.kernel)
        return config.experts * (config.rank * (inputs + site.out_features) + inputs)
