"""The shared parts of PHA's adapters: prototypes of tasks, the network that makes adapters of them, and the retriever,
whose losses hold prototypes and texts together.

`config` has the widths t (`task_width`), h (`hidden`) and p (`code`), and the options of the losses.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Operator, PromptPositions, Shared, Site, TokenStack, by_row, forward_context, full_precision
from peftcore_multitask._tasks import Tasks, task_count


class Prototypes(nn.Module):
    """A vector of each task, ``[tasks, t]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(task_count(config), config.task_width))


class Hypernetwork(nn.Module):
    """Makes adapters between two widths."""

    def __init__(self, inputs: int, outputs: int, config: Any) -> None:
        super().__init__()
        code, r = config.code, config.bottleneck
        self.inputs, self.outputs = inputs, outputs
        self.first, self.second = nn.Linear(2 * config.task_width, config.hidden), nn.Linear(config.hidden, code)
        self.norm = nn.LayerNorm(code, eps=1e-6)
        self.down, self.down_bias = nn.Linear(code, r * inputs), nn.Linear(code, r)
        self.up, self.up_bias = nn.Linear(code, outputs * r), nn.Linear(code, outputs)
        for head, fan in ((self.down, inputs), (self.up, r), (self.down_bias, 1), (self.up_bias, 1)):
            bound = config.init_scale * math.sqrt(3 / (code * fan))
            nn.init.uniform_(head.weight, -bound, bound)
            nn.init.zeros_(head.bias)

    def forward(self, prototypes: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        """Return W_down [n, r, in], b_down [n, 1, r], W_up [n, out, r] and b_up [n, 1, out] of prototypes [n, t]."""
        with full_precision(prototypes):
            both = torch.cat([prototypes, place.expand_as(prototypes)], -1)
            z = self.norm(self.second(self.first(both).relu()))
            down, up = self.down(z).unflatten(-1, (-1, self.inputs)), self.up(z).unflatten(-1, (self.outputs, -1))
            return down, self.down_bias(z).unsqueeze(-2), up, self.up_bias(z).unsqueeze(-2)


class Retriever(nn.Module):
    """Makes the vector of a text, of its mean state."""

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, config.hidden), nn.Linear(config.hidden, config.task_width)

    def forward(self, mean: Tensor) -> Tensor:
        """Return ``[rows, t]`` of means ``[rows, width]``."""
        vector: Tensor = self.second(self.first(mean).relu())
        return vector


class Contrast:
    """Adds the losses of the rows of a batch, for the operator that sees their states."""

    def __init__(self, site: Site, config: Any, retriever: Shared, prototypes: Shared) -> None:
        self.retriever, self.prototypes, self.tasks = retriever, prototypes, Tasks(site, config)
        self.factor, self.temperature = config.contrast, config.temperature

    def add(self, operator: Operator, states: Tensor, counts: Tensor | None) -> None:
        """Add the loss of an operator for ``[rows, tokens, width]``, of which those count that `counts` ``[rows,
        tokens]`` has."""
        prototypes = self.prototypes.module.value
        with full_precision(states):
            states = states.to(prototypes.dtype)
            kept = states.new_ones(states.shape[:2]) if counts is None else counts.to(states.dtype)
            mean = (states * kept.unsqueeze(-1)).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
            every = torch.arange(len(prototypes), device=states.device)
            tasks = self.tasks.of_rows(every, len(mean)).expand(len(mean))
            loss = contrast(self.retriever.module(mean), tasks, prototypes, self.temperature)
        forward_context().add_loss(self.factor * loss, operator)


class ReadingOperator(Operator):
    """Gives the retriever what a stack of tokens returns, or the norm behind the last block, in training."""

    def __init__(self, site: Site, config: Any, stack: TokenStack | None, contrast: Contrast) -> None:
        super().__init__(site)
        self.contrast, self.names, self.positions = contrast, site.arguments, None
        if stack is not None:
            self.positions = PromptPositions(0, stack.causal and not stack.readers, 0, sys.maxsize, halves=False)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if self.training and self.positions is None:
            self.contrast.add(self, *by_row(self.layer.channels_last(output))[:2])
        elif self.training and self.positions is not None:
            states = output if isinstance(output, Tensor) else output[0]  # [rows, tokens, d]
            given = {**dict(zip(self.names, args, strict=False)), **kwargs}
            found = self.positions.positions(states, given, training=True)
            if found is not None:
                self.contrast.add(self, states, found[1].expand(states.shape[:2]))
        return output


def contrast(vectors: Tensor, tasks: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss of the vectors of rows ``[rows, t]`` with tasks ``[rows]``: against each other, and
    against the prototypes ``[tasks, t]`` of other tasks."""
    vectors, prototypes = (nn.functional.normalize(each, dim=-1) for each in (vectors, prototypes))
    least = torch.finfo(vectors.dtype).min
    alone = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    scores = (vectors @ vectors.mT / temperature).masked_fill(alone, least)
    like = (tasks.unsqueeze(1) == tasks) & ~alone  # [rows, rows]
    logs = (scores - scores.logsumexp(1, keepdim=True)).where(like, 0.0).sum(1) / like.sum(1).clamp(min=1)
    met = like.any(1)
    instances = -logs.sum() / met.sum().clamp(min=1)  # rows without another one of their task have zero there
    scores = vectors @ prototypes.mT / temperature
    own = nn.functional.one_hot(tasks, len(prototypes)).bool()
    logs = scores.where(own, 0.0).sum(1) - scores.masked_fill(own, least).logsumexp(1)
    return instances - logs.mean()
