"""Polytropon, and its multi-head routing.   Ponti et al. 2022, arXiv 2202.13914; Caccia et al. 2022, arXiv 2211.03831.

Equation:
    y = W x + b + s (sum_k w_k B_k) (sum_k w_k A_k) x,   s = 1 / rank,   w = z / sum_k z

Skill k of a site is a low-rank update A_k [rank, in], B_k [out, rank]. Task t has a logit for each skill, Z_t. In
evaluation z = sigmoid(Z_t). In training z is drawn for each row of the module's input, from the relaxed Bernoulli
distribution with these logits: z = sigmoid(Z_t + log u - log(1 - u)), u uniform. A and B are averaged separately.

With `own_skills` it is C-Poly (Wang et al. 2023, arXiv 2312.03248): each task has `own_skills` additional skills, which
only this task uses. They have logits like the common skills, and k runs over both.

With `splits` it is multi-head routing: the inputs of A and the outputs of B are cut into groups, and each group has
separate logits and skills.

The call passes the task by ``with peftcore.call(model, task=...)``: one task for all rows, or one for each row. So no
single weight equals the update, and the method cannot be merged. Tensors that the model reads without calling their
module are refused, because they cannot be adapted row by row.

The authors (microsoft/mttl) train Z a hundred times faster than the skills, without weight decay; peft leaves that to
the user. Parameters: (skills + tasks * own_skills) * rank * (in * kernel + out) + tasks * splits * (skills +
own_skills) per site. A forward computes the own skills of all tasks, and multiplies those of other tasks by zero.

Start: A_k uniform in +-1/sqrt(3 in), narrower than a LoRA, B_k at zero, Z uniform in +-0.001. A fresh adapter is the
identity. In convolutions, the 3 in of A's start counts the kernel too; in embeddings A starts at zero and B ~ N(0, 1).

Differs from the authors' code: No difference is known for Polytropon (microsoft/mttl); peft starts A as wide as a LoRA,
+-1/sqrt(in). No code of C-Poly's authors was found. The equation of C-Poly adds the outputs of skills. Here A and B of
all skills, also of own ones, are averaged separately, as in Polytropon's code.

Use it: `peftcore.apply(model, "polytropon", tasks=["sums", "letters"])`, for many related tasks: their common skills
are learned once, and a new task needs few examples. Own skills are for tasks that interfere with each other; their size
grows with the number of tasks (mtl_lora has only a small matrix for each task).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, AppliedMethod, LearningRate, Method, Router, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_multitask._skills import blocks, factors, joined
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count


class PolytroponConfig(TaskConfig):
    """Options of Polytropon."""

    method: Literal["polytropon"] = "polytropon"
    skills: PositiveInt = 4
    """Number of low-rank updates of a site that all tasks share."""
    own_skills: NonNegativeInt = 0
    """Number of additional low-rank updates for each task; above 0, the method is C-Poly."""
    splits: PositiveInt = 1
    """Number of groups of inputs and of outputs that are routed separately; above 1, it is multi-head routing."""
    rank: PositiveInt = 8
    """Rank of each skill."""
    sampled: bool = True
    """Sample the weights of skills in training; False uses the weights of evaluation."""
    routing_ratio: PositiveFloat = 100.0
    """The learning rate of the logits, relative to that of the skills."""


class PolytroponOperator(Router):
    """The skills of one site, and the logits of its tasks."""

    routes = "task"

    def __init__(self, site: Site, config: PolytroponConfig) -> None:
        super().__init__(site)
        splits = config.splits
        if site.in_features % splits or site.out_features % splits:
            raise UnsupportedSite(
                f"{site.path} has {site.in_features} inputs and {site.out_features} outputs, which splits={splits} "
                "does not divide; set another splits, or exclude it"
            )
        inputs, outputs, spread = site.in_features // splits, site.out_features // splits, 3 * site.in_features
        self.scale, self.tasks = 1 / config.rank, Tasks(site, config)
        self.noise = 1.0 if config.sampled else 0.0
        self.count, self.skills, self.own = task_count(config), config.skills, config.own_skills
        lead = (splits, self.skills)
        self.A, self.B = factors(site, (*lead, config.rank, inputs), (*lead, outputs, config.rank), spread)
        self.logits = nn.Parameter(torch.empty(self.count, splits, self.skills + self.own).uniform_(-1e-3, 1e-3))
        self.own_A: nn.Parameter | None = None
        self.own_B: nn.Parameter | None = None
        if self.own:
            lead = (splits, self.count * self.own)
            self.own_A, self.own_B = factors(site, (*lead, config.rank, inputs), (*lead, outputs, config.rank), spread)

    def weights(self, rows: int) -> Tensor:
        """Return the weight of each skill for each row, ``[rows or 1, splits, skills + own_skills]``."""
        logits = self.tasks.of_rows(self.logits, rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.training and self.noise:
            uniform = torch.rand(rows, *logits.shape[1:], dtype=logits.dtype, device=logits.device)
            logits = logits + torch.logit(uniform, eps=torch.finfo(logits.dtype).eps)
        chosen = logits.sigmoid()
        return chosen / (chosen.sum(-1, keepdim=True) + 1e-12)

    def spread(self, weights: Tensor, rows: int) -> Tensor:
        """Return weights over the skills of all tasks, ``[rows or 1, splits, skills + tasks * own_skills]``: zero for
        the own skills of other tasks."""
        if not self.own:
            return weights
        common, own = weights.split([self.skills, self.own], -1)
        mine = self.tasks.of_rows(torch.eye(self.count, dtype=own.dtype, device=own.device), rows)  # [rows or 1, tasks]
        own = (mine[:, None, :, None] * own.unsqueeze(-2)).flatten(-2)
        return torch.cat([common, own], -1)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, joined(self.A, self.own_A), joined(self.B, self.own_B))
        low = self.layer.channels_last(self.layer.apply(x, blocks(A.flatten(1, 2))))  # [..., splits * skills * rank]
        batched = low.dim() > -self.layer.channel_dim
        rows = len(low) if batched else 1
        weights = self.weights(rows)
        self.noted(weights.expand(rows, *weights.shape[1:]))
        (w,) = self.cast(y, self.spread(weights, rows))
        w = w.view(*w.shape[: int(batched)], *[1] * (low.dim() - 1 - int(batched)), *w.shape[-2:], 1)
        low = (low.unflatten(-1, A.shape[:3]) * w).sum((-3, -2))  # [..., rank]
        low = self.layer.channels_back((low[..., None, None, :] * w).flatten(-3))
        return self.layer.add(y, low, blocks(B.transpose(1, 2).flatten(2)), self.scale)


class Polytropon(Method):
    """Low-rank skills that tasks choose from.

    Example:
        injection = peftcore.apply(model, "polytropon", tasks=["sums", "letters"])
        peftcore.call(model, task="sums")  # or a list, one for each row; with `with`, for a while
    """

    name = "polytropon"
    Config = PolytroponConfig
    tags = Tags(category="multitask", paper="2202.13914", random=True, routes="task")
    learning_rate = LearningRate(
        1e-3, "microsoft/mttl@c66b20d, projects/mhr/configs/t0/poly_lora.json", on="T5-XL, T0", optimizer="Adafactor"
    )
    target = ("attn.q", "attn.k", "attn.v", "attn.out", "cross.q", "cross.k", "cross.v", "cross.out")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: PolytroponConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, PolytroponOperator, config)

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        operators = [each for each in injection.operators.values() if isinstance(each, PolytroponOperator)]
        logits = {id(each.logits) for each in operators}
        trained = [p for p in injection.parameters() if p.requires_grad]
        skills = {"params": [p for p in trained if id(p) not in logits], **defaults, "lr": lr}
        routing = {"params": [p for p in trained if id(p) in logits], **defaults}
        return [skills, {**routing, "lr": lr * injection.config.routing_ratio, "weight_decay": 0.0}]

    @staticmethod
    def parameter_count(site: Site, config: PolytroponConfig) -> int:
        numbers = site.in_features * math.prod(site.kernel) + site.out_features
        tasks, of_a_task = task_count(config), config.skills + config.own_skills
        return (config.skills + tasks * config.own_skills) * config.rank * numbers + tasks * config.splits * of_a_task
