"""MTL-LoRA: a LoRA whose middle and whose mixture of B belong to the task.   Yang et al. 2024, arXiv 2410.09437.

Equation:
    y = W x + b + s sum_i w_ti B_i (L_t A dropout(x)),   w_t = softmax(v_t / temperature),   s = alpha / rank

A [rank, in] and the B_i [out, rank] are shared by all tasks. Task t has a matrix L_t [rank, rank] (or only its
diagonal), which transforms the output of A for this task, and a logit v_ti for each B_i. The softmax is taken in
float32 at least. Convolutions and embeddings have factors as in LoRA.

The call passes the task by ``with peftcore.call(model, task=...)``: one task for all rows, or one for each row. So no
single weight equals the update, and the method cannot be merged. Tensors that the model reads without calling their
module are refused, because they cannot be adapted row by row.

Parameters: rank * in * kernel + ups * rank * out + tasks * (rank^2 + ups) per site; with diagonals, rank instead of
rank^2.

Start: A as in LoRA, B_i at zero, L_t as the identity, v_t uniform in +-1/sqrt(ups). A fresh adapter is the identity.

Differs from the authors' code: No difference is known (pUmpKin-Co/MTL-LoRA, whose script has whole matrices L_t). The
adapters package has another default, diagonals and one B, multiplies by L_t transposed, and starts the logits equal.

Use it: `peftcore.apply(model, "mtl_lora", tasks=["sums", "letters"])`, for tasks that interfere with each other in one
LoRA; not for tasks with little in common (`polytropon` can have skills that only one task uses), nor where the task is
unknown (`hydralora`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, LearningRate, Method, Operator, Share, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_multitask._skills import factors
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count


class MTLLoRAConfig(TaskConfig):
    """Options of MTL-LoRA."""

    method: Literal["mtl_lora"] = "mtl_lora"
    rank: PositiveInt = 8
    """Rank of the update."""
    ups: PositiveInt = 3
    """Number of matrices B, which each task mixes by its own weights."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    temperature: PositiveFloat = 0.1
    """Divisor of the logits of the mixture. With a smaller divisor, each task uses mostly one B."""
    task_matrix: Literal["full", "diagonal"] = "full"
    """The form of each task's matrix L_t: a full matrix, or only a diagonal."""
    dropout: Share = 0.05
    """Dropout probability of the update's inputs."""


class MTLLoRAOperator(Operator):
    """The shared factors of one site, and the matrix and logits of each task."""

    def __init__(self, site: Site, config: MTLLoRAConfig) -> None:
        super().__init__(site)
        if config.dropout and self.layer.one_hot:
            raise UnsupportedSite(
                f"{site.path} reads token ids, which dropout cannot act on; use dropout=0 or exclude it"
            )
        self.scale, self.temperature, self.tasks = config.alpha / config.rank, config.temperature, Tasks(site, config)
        self.dropout = nn.Dropout(config.dropout)
        rank, inputs, count = config.rank, site.in_features, task_count(config)
        self.A, self.B = factors(site, (rank, inputs), (config.ups, site.out_features, rank), inputs)
        diagonals = torch.ones(count, rank)
        self.middle = nn.Parameter(diagonals if config.task_matrix == "diagonal" else torch.diag_embed(diagonals))
        bound = 1 / math.sqrt(config.ups)
        self.logits = nn.Parameter(torch.empty(count, config.ups).uniform_(-bound, bound))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        low = self.layer.channels_last(self.layer.apply(self.dropout(x), A))  # [..., rank]
        rows = self.layer.rows(low)
        logits = self.tasks.of_rows(self.logits, rows) / self.temperature
        shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        shares, middle = self.cast(y, shares, self.tasks.of_rows(self.middle, rows))  # [rows or 1, ups], [.., rank(^2)]
        if middle.dim() == 2:
            middle = torch.diag_embed(middle)
        flat = low.reshape(rows, -1, low.shape[-1]) @ middle.mT  # [rows, positions, rank]
        mixed = shares[:, None, :, None] * flat.unsqueeze(-2)  # [rows, positions, ups, rank]
        mixed = self.layer.channels_back(mixed.reshape(*low.shape[:-1], -1))
        return self.layer.add(y, mixed, B.transpose(0, 1).flatten(1), self.scale)


class MTLLoRA(Method):
    """Low-rank adaptation in which each task has its own middle matrix and its own mixture of B.

    Example:
        injection = peftcore.apply(model, "mtl_lora", tasks=["sums", "letters"])
        peftcore.call(model, task="sums")  # or a list, one for each row; with `with`, for a while
    """

    name = "mtl_lora"
    Config = MTLLoRAConfig
    tags = Tags(category="multitask", paper="2410.09437", random=True)
    learning_rate = LearningRate(
        3e-4, "pUmpKin-Co/MTL-LoRA@7848a70, script/llama2_7B_mlora_qkvo.sh", on="LLaMA 2 7B, commonsense"
    )
    target = ("attn.q", "attn.k", "attn.v", "attn.out", "cross.q", "cross.k", "cross.v", "cross.out")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: MTLLoRAConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, MTLLoRAOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: MTLLoRAConfig) -> int:
        rank, inputs = config.rank, site.in_features * math.prod(site.kernel)
        own = (rank if config.task_matrix == "diagonal" else rank**2) + config.ups
        return rank * inputs + config.ups * rank * site.out_features + task_count(config) * own
