"""Networks that make adapters: of the embeddings of tasks, and of layers and places where they share one network.

`config` has the options of HyperFormer: the widths t (`task_width`), h (`hidden`) and p (`code`), and how they start.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Shared, Site, Surgeon, stack_path
from peftcore_multitask._tasks import task_count


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear


class Reader(nn.Module):
    """The network from embeddings to z."""

    def __init__(self, embeddings: int, config: Any) -> None:
        super().__init__()
        self.first = _linear(embeddings * config.task_width, config.hidden, config.init_std)
        self.second = _linear(config.hidden, config.code, config.init_std)

    def forward(self, embedding: Tensor) -> Tensor:
        """Return z ``[..., p]`` of embeddings one behind the other."""
        z: Tensor = self.second(self.first(embedding).relu())
        return z


class TaskTable(nn.Module):
    """The embeddings of tasks, and the network that reads them where it reads nothing else."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(task_count(config), config.task_width))
        self.reader = None if config.shared else Reader(1, config)


class Generators(nn.Module):
    """The linear maps that make an adapter of z."""

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        code, r, std = config.code, config.bottleneck, config.init_std
        self.width, self.bottleneck = width, r
        self.down, self.down_bias = _linear(code, r * width, std), _linear(code, r, std)
        self.up, self.up_bias = _linear(code, width * r, std), _linear(code, width, std)
        self.gain, self.shift = (_linear(code, width, config.gain_std) for _ in range(2))

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return W_down [n, r, d], b_down [n, 1, r], W_up [n, d, r], and b_up, gain and shift [n, 1, d]."""
        down, up = self.down(z).unflatten(-1, (-1, self.width)), self.up(z).unflatten(-1, (self.width, -1))
        rows = (each(z).unsqueeze(-2) for each in (self.down_bias, self.up_bias, self.gain, self.shift))
        down_bias, *others = rows
        return down, down_bias, up, *others


class Embedding(nn.Module):
    """The embedding of a layer, or of a place in a block."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(config.task_width))


class Network(Generators):
    """The network of a stack: it makes adapters of their tasks, layers and places."""

    def __init__(self, width: int, config: Any) -> None:
        super().__init__(width, config)
        self.reader = Reader(3, config)
        self.norm = nn.LayerNorm(config.code, eps=1e-6)

    def code(self, tasks: Tensor, layer: Tensor, place: Tensor) -> Tensor:
        """Return z ``[tasks, p]``."""
        here = torch.cat([layer, place]).expand(len(tasks), -1)
        z: Tensor = self.norm(self.reader(torch.cat([tasks, here], -1)))
        return z


@dataclass(frozen=True)
class Known:
    """Parts that a site shares with others: the network of its stack, and the embeddings of its layer and its place."""

    network: Shared
    layer: Shared
    place: Shared


def known_of(surgeon: Surgeon, site: Site, config: Any) -> Known:
    """Return what a site shares, each named by where it is, so that it does not depend on other sites. A stack is all
    blocks whose paths are alike but for numbers; these numbers are the layer, and the common part of the sites' paths
    is the place."""
    path, width = site.module_path, site.out_features
    block = next((each.block for each in surgeon.resolver.host.at(path) if each.block is not None), None)
    stack = "" if block is None else stack_path(block)
    layer = ".".join(re.findall(r"\d+", path if block is None else block))
    return Known(
        surgeon.own(part_name("network", stack, str(width)), lambda: Network(width, config)),
        surgeon.own(part_name("layer", stack, layer), lambda: Embedding(config)),
        surgeon.own(part_name("place", stack_path(path)), lambda: Embedding(config)),
    )


def part_name(*parts: str) -> str:
    """Return the name of a shared part, made of its kind and its location."""
    return "/".join(filter(None, parts)).replace(".", "/").replace("*", "n")
