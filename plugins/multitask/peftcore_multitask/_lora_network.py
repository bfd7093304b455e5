"""The network that makes LoRAs of vectors, and the parts of it that sites share. `config` has the options of
Text-to-LoRA: the widths of its input (`vector_width`), inside (`latent`) and in front of the heads (`head_width`), and
its dropout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Shared, Site, Surgeon, forward_context, stack_path
from peftcore.errors import ConfigError, RouteError


class Block(nn.Module):
    """A norm and a feed-forward with a residual connection."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., width]``."""
        inner = self.dropout(nn.functional.silu(self.up(self.norm(x))))
        return x + self.dropout(nn.functional.silu(self.down(inner)))


class LoRANetwork(nn.Module):
    """The network that all sites share: it reads a vector and embeddings of the LoRA's layer and kind of matrix."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, part = config.latent, config.latent // 4
        self.reader, self.reader_norm = nn.Linear(config.vector_width, 2 * part), nn.LayerNorm(2 * part)
        self.layer_norm, self.kind_norm = nn.LayerNorm(part), nn.LayerNorm(part)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.blocks = nn.ModuleList(Block(width, config.network_dropout) for _ in range(2))
        self.last_norm, self.last_up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.last_down = nn.Linear(4 * width, config.head_width)
        self.dropout = nn.Dropout(config.network_dropout)

    def forward(self, vectors: Tensor, layer: Tensor, kind: Tensor) -> Tensor:
        """Return z ``[n, head_width]`` for vectors ``[n, vector_width]``, a layer and a kind ``[latent / 4]``."""
        where = torch.cat([self.layer_norm(layer), self.kind_norm(kind)]).expand(len(vectors), -1)
        x = self.dropout(torch.cat([self.reader_norm(self.reader(vectors)), where], -1))
        x = self.dropout(nn.functional.silu(self.up(x)))
        x = self.dropout(nn.functional.silu(self.down(x)))
        for block in self.blocks:
            x = block(x)
        x = self.dropout(nn.functional.silu(self.last_up(self.last_norm(x))))
        return nn.functional.silu(self.last_down(x))


class LayerEmbedding(nn.Module):
    """The embedding of one layer of a stack."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(config.latent // 4))


class Kind(nn.Module):
    """The shared parts of the LoRAs of one kind of matrix: its embedding, and the head that makes them of z. The head
    starts as a LoRA, the same for all vectors: A uniform in +-1/sqrt(in), B zero."""

    def __init__(self, inputs: int, outputs: int, config: Any) -> None:
        super().__init__()
        self.inputs, self.rank = inputs, config.rank
        self.value = nn.Parameter(torch.randn(config.latent // 4))
        self.head = nn.Linear(config.head_width, config.rank * (inputs + outputs))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        nn.init.uniform_(self.head.bias[: config.rank * inputs], -(inputs**-0.5), inputs**-0.5)

    def factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return A ``[n, rank, in]`` and B ``[n, out, rank]``."""
        made = self.head(z)
        A, B = made[..., : self.rank * self.inputs], made[..., self.rank * self.inputs :]
        return A.unflatten(-1, (self.rank, -1)), B.unflatten(-1, (self.rank, -1)).mT


class Told:
    """Looks up the vectors that a call passes."""

    def __init__(self, site: Site, width: int) -> None:
        self.path, self.width, self.apart = site.path, width, not site.mixes_rows

    def of_rows(self, rows: int) -> Tensor:
        """Return a vector for all of so many rows ``[1, width]``, or one for each, or for each few that follow each
        other (beams, windows).

        Raises:
            MissingContext: the call does not pass a vector.
            ConfigError: it is not a table of vectors of that width.
            RouteError: there are not as many rows.
        """
        running = forward_context()
        running.need("task_vector")
        told = running.told("task_vector")
        if not isinstance(told, Tensor) or told.dim() != 2 or told.shape[1] != self.width:
            raise ConfigError(f"task_vector is a tensor [1 or rows, {self.width}]: embeddings of descriptions of tasks")
        if len(told) != 1 and not self.apart:
            raise RouteError(f"{self.path} got {rows} rows, which cannot be told apart by {len(told)} vectors of tasks")
        return running.for_rows("task_vector", rows, told)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold modules in evaluation mode, without dropout."""
    was = {each: each.training for module in modules for each in module.modules()}
    try:
        for each in was:
            each.training = False
        yield
    finally:
        for each, mode in was.items():
            each.training = mode


@dataclass(frozen=True)
class Known:
    """The parts that a site shares with others: the network, the embedding of its layer, and its kind; and how many
    sites are of that kind."""

    network: Shared
    layer: Shared
    kind: Shared
    alike: int = 1


def kind_name(site: Site) -> str:
    """Return the name of a site's kind: its path without the numbers of layers, and its size."""
    return _name("kind", f"{stack_path(site.path)}", f"{site.in_features}x{site.out_features}")


def known_of(surgeon: Surgeon, site: Site, config: Any, alike: int) -> Known:
    """Return what a site shares, each named by where it is, so that it does not depend on other sites."""
    block = next((each.block for each in surgeon.resolver.host.at(site.module_path) if each.block is not None), None)
    stack = "" if block is None else stack_path(block)
    layer = ".".join(re.findall(r"\d+", site.module_path if block is None else block))
    inputs, outputs = site.in_features, site.out_features
    return Known(
        surgeon.own("network", lambda: LoRANetwork(config)),
        surgeon.own(_name("layer", stack, layer), lambda: LayerEmbedding(config)),
        surgeon.own(kind_name(site), lambda: Kind(inputs, outputs, config)),
        alike,
    )


def _name(*parts: str) -> str:
    return "/".join(filter(None, parts)).replace(".", "/").replace("*", "n").replace(":", "/")
