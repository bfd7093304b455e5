"""MOELoRA: low-rank experts that tasks share.   Liu et al. 2023, arXiv 2310.18339 (liuqidong07/MOELoRA-peft).

Equation:
    y = W x + b + s sum_e g_e B_e A_e dropout(x),   g = softmax(W_g v_t),   s = alpha / rank

`rank` is the sum of the ranks of all experts: each expert has rank / experts, and the scale uses the sum. v_t
[task_width] is the vector of task t; W_g [experts, task_width] is without bias. All sites share one v and one W_g, as
in the paper and in the authors' script; with ``gate="each"``, each site has its own. The softmax is taken in float32 at
least.

The call passes the task by ``with peftcore.call(model, task=...)``: one task for all rows, or one for each row. So no
single weight equals the update, and the method cannot be merged. Tensors that the model reads without calling their
module are refused, because they cannot be adapted row by row.

Parameters: rank * (in * kernel + out) per site, and (tasks + experts) * task_width once; with ``gate="each"`` per site.

Start: v from N(0, 1), W_g uniform in +-1/sqrt(task_width), A_e from N(0, 0.01), B_e at zero. A fresh adapter is the
identity.

Differs from the authors' code: The authors' table of tasks has an additional row, which no task reads. Their layer with
a gate for each site (MMOELoraLinear) is ``gate="each"`` here; their script does not use it. Rank 16 and 8 experts are
from their script, and alpha is the default of their arguments.

Use it: `peftcore.apply(model, "moelora", tasks=["entities", "summaries"])`, for known tasks, some of them with little
data. One adapter has as many parameters as a LoRA of its rank. `polytropon` lets tasks share skills without a vector
for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, Share, Shared, Site, Surgeon, Tags
from peftcore.errors import ConfigError
from peftcore_multitask._mixture import ExpertsOperator
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count

OF_THE_GATE = {"experts", "gate", "task_width", "tasks"}
"""Options of the gate, which all sites share."""


class MOELoRAConfig(TaskConfig):
    """Options of MOELoRA."""

    method: Literal["moelora"] = "moelora"
    experts: PositiveInt = 8
    """Number of low-rank updates (experts) of a site."""
    rank: PositiveInt = 16
    """Sum of the ranks of all experts."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.1
    """Dropout probability of the inputs of each expert."""
    task_width: PositiveInt = 64
    """Length of a task's vector."""
    gate: Literal["shared", "each"] = "shared"
    """Whether all sites share the vectors of tasks and the gate, or each has its own."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.rank % self.experts:
            raise ValueError(
                f"rank={self.rank} cannot be split equally among {self.experts} experts; set rank to a multiple"
            )
        return self


class TaskGate(nn.Module):
    """The vectors of tasks, and the matrix that computes gates from them."""

    def __init__(self, config: MOELoRAConfig) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(task_count(config), config.task_width))
        bound = 1 / math.sqrt(config.task_width)
        self.gate = nn.Parameter(torch.empty(config.experts, config.task_width).uniform_(-bound, bound))


class MOELoRAOperator(ExpertsOperator):
    """The experts of one site, mixed for each task by the shared gate, or by the site's gate."""

    routes = "task"
    stackable = False  # rows have tasks

    def __init__(self, site: Site, config: MOELoRAConfig, shared: Shared | None) -> None:
        super().__init__(site, config.experts, config.rank // config.experts, config.alpha / config.rank,
                         config.dropout)  # fmt: skip
        self.start_normal(0.01)
        self.tasks, self.shared = Tasks(site, config), shared
        if shared is None:
            own = TaskGate(config)
            self.vectors, self.gate = own.vectors, own.gate

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        channels, places = self.layer.channel_dim, x.dim() + int(self.layer.one_hot)
        batched = places > -channels
        rows = len(x) if batched else 1
        holder = self if self.shared is None else self.shared.module
        vectors, gate = holder.vectors.to(x.device), holder.gate.to(x.device)
        logits = self.tasks.of_rows(vectors, rows) @ gate.T  # [rows or 1, experts]
        gates = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        self.noted(gates.expand(rows, -1))
        gates = gates.view(*gates.shape[: int(batched)], *[1] * (places - 1 - int(batched)), -1)
        return self.update(call, x, gates.movedim(-1, channels))


class MOELoRA(Method):
    """Low-rank experts, which each task mixes with different shares.

    Example:
        injection = peftcore.apply(model, "moelora", tasks=["entities", "summaries"])
        peftcore.call(model, task="entities")  # or a list, one for each row; with `with`, for a while
    """

    name = "moelora"
    Config = MOELoRAConfig
    tags = Tags(category="multitask", paper="2310.18339", random=True, routes="task")
    learning_rate = LearningRate(2e-4, "liuqidong07/MOELoRA-peft@2d9efa4, experiments/moelora.bash", on="ChatGLM-6B")
    target = ("attn.*", "mlp.gate", "mlp.up", "mlp.down")
    alternatives = MATRICES
    config_version = 2
    former_defaults = ({"gate": "each"},)

    def inject(self, model: nn.Module, config: MOELoRAConfig, surgeon: Surgeon) -> None:
        fixed, remedy = (OF_THE_GATE, ', or set gate="each"') if config.gate == "shared" else ({"gate"}, "")
        if any(fixed & changes.keys() for changes in config.overrides.values()):
            names = ", ".join(sorted(fixed))
            raise ConfigError(f"moelora: overrides cannot change {names}: set one value for all sites{remedy}")
        shared = surgeon.own("tasks", lambda: TaskGate(config)) if config.gate == "shared" else None
        for site in surgeon.sites():
            surgeon.graft(site, MOELoRAOperator, config, shared=shared)

    @staticmethod
    def parameter_count(site: Site, config: MOELoRAConfig) -> int:
        inputs = site.in_features * math.prod(site.kernel)
        own = 0 if config.gate == "shared" else (task_count(config) + config.experts) * config.task_width
        return config.rank * (inputs + site.out_features) + own
