"""Text-to-LoRA: LoRAs that a network makes of the description of a task.   Charakorn et al. 2025, arXiv 2506.06105
(code: SakanaAI/text-to-lora).

This is the largest of the paper's three networks, trained by the loss of the model itself. The paper's smaller
networks, whose heads compute A and B, or their rows, one after the other, are not available. Neither is the paper's
other way of training, on existing LoRAs (recon).

Equation:
    y = W x + b + s B A dropout(x),   s = alpha / sqrt(rank),   (A, B) = H z + h
    z = M([LN(E v + e) ; LN(layer) ; LN(kind)])

v is a vector that the call passes: an embedding of the task's description by any model that embeds texts. `layer` is an
embedding of the layer, and `kind` an embedding of the kind of matrix in that layer. Each kind has a head H, h. M
consists of feed-forwards with SiLU, two of them with residual connections, and a dropout of 0.05. Each kind adds decay
* (mean A^2 + mean B^2) to the loss.

    with peftcore.call(model, task_vector=embedded): ...      # [1, vector_width] for all rows, or [rows, vector_width]
    make_lora(injection, embedded[0])                         # a plain LoRA: it merges, and is saved by itself

The authors' scripts train this network. In models with several stacks, each stack has separate embeddings of layers and
kinds.

Parameters, l = latent and w = head_width: (vector_width + 1) l / 2 + 28 l^2 + 27 l + (4 l + 1) w in the network, l / 4
for each layer and each kind, and (w + 1) rank (in + out) for each kind.

Start: H at zero and h as a LoRA's start, so the LoRA is the same for all vectors and does nothing. A fresh adapter is
the identity.

Differs from the authors' code: The networks and the way of training that are named above as not available; no other
difference is known.

Use it: `peftcore.apply(model, "text_to_lora", vector_width=384)`, for hundreds of tasks with descriptions, where a new
task should need no training; not for a few tasks, nor for tasks without a description (`hyperformer_pp` learns an
embedding of each task).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore import Injection, lora_of
from peftcore.author import (
    MATRICES,
    AppliedMethod,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    forward_context,
    sees_vectors,
    stack_path,
)
from peftcore.errors import ConfigError, RouteError, UnsupportedSite
from peftcore_multitask._part_names import part_name


class TextToLoRAConfig(MethodConfig):
    """Options of Text-to-LoRA."""

    overridable = ("alpha", "dropout", "decay")

    method: Literal["text_to_lora"] = "text_to_lora"
    vector_width: PositiveInt = 1024
    """Width of the vectors that calls pass."""
    rank: PositiveInt = 8
    """Rank of the LoRAs."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / sqrt(rank)``."""
    dropout: Share = 0.05
    """Dropout probability of the update's inputs."""
    latent: Annotated[PositiveInt, Field(multiple_of=4)] = 128
    """Width l of the network. Half of its input is computed from the vector, and a quarter each from the embeddings of
    layer and kind."""
    head_width: PositiveInt = 512
    """Width w of z, which the heads read."""
    network_dropout: Share = 0.05
    """Dropout probability inside the network."""
    decay: NonNegativeFloat = 1e-3
    """Factor of the penalty on the LoRAs' values."""


class Block(nn.Module):
    """A norm and a feed-forward with a residual connection."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output ``[..., width]``."""
        inner = self.dropout(nn.functional.silu(self.up(self.norm(x))))
        return x + self.dropout(nn.functional.silu(self.down(inner)))


class LoRANetwork(nn.Module):
    """The network that all sites share. It reads a task vector, and the embeddings of a LoRA's layer and kind of
    matrix."""

    def __init__(self, config: TextToLoRAConfig) -> None:
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

    def __init__(self, config: TextToLoRAConfig) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(config.latent // 4))


class Kind(nn.Module):
    """The embedding of one kind of matrix, and the head that computes the kind's LoRAs from z. At the start, the head
    returns the same LoRA for all vectors: A uniform in +-1/sqrt(in), B zero."""

    def __init__(self, inputs: int, outputs: int, config: TextToLoRAConfig) -> None:
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
    """Looks up the task vectors that a call passes."""

    def __init__(self, site: Site, width: int) -> None:
        self.path, self.width, self.apart = site.path, width, not site.mixes_rows

    def of_rows(self, rows: int) -> Tensor:
        """Return one vector for all rows ``[1, width]``, or one for each row. Vectors are repeated if the module gets
        several rows for each row of the batch (beams, windows).

        Raises:
            MissingContext: the call does not pass a vector.
            ConfigError: the call's value is not a tensor of vectors of this width.
            RouteError: the number of rows does not fit the number of vectors.
        """
        running = forward_context()
        running.need("task_vector")
        told = running.told("task_vector")
        if not isinstance(told, Tensor) or told.dim() != 2 or told.shape[1] != self.width:
            raise ConfigError(
                f"task_vector must be a tensor [1 or rows, {self.width}]: embeddings of task descriptions"
            )
        if len(told) != 1 and not self.apart:
            raise RouteError(
                f"{self.path} got {rows} rows, which cannot be assigned to {len(told)} task vectors; pass one for all "
                "rows"
            )
        return running.for_rows("task_vector", rows, told)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set modules to evaluation mode inside a `with` block, and restore their modes afterwards."""
    was = {each: each.training for module in modules for each in module.modules()}
    try:
        for each in was:
            each.training = False
        yield
    finally:
        for each, mode in was.items():
            each.training = mode


@dataclass(frozen=True)
class HypernetworkParts:
    """The parts that a site shares with other sites: the network, the embedding of its layer, and its kind. `alike` is
    the number of sites of this kind."""

    network: Shared
    layer: Shared
    kind: Shared
    alike: int = 1


def kind_name(site: Site) -> str:
    """Return the name of a site's kind: its path without the numbers of layers, and its size."""
    return part_name("kind", stack_path(site.path), f"{site.in_features}x{site.out_features}")


def known_of(surgeon: Surgeon, site: Site, config: TextToLoRAConfig, alike: int) -> HypernetworkParts:
    """Return the parts that a site shares with other sites. Their names depend only on the path and the size of the
    site."""
    block = next((each.block for each in surgeon.resolver.host.at(site.module_path) if each.block is not None), None)
    stack = "" if block is None else stack_path(block)
    layer = ".".join(re.findall(r"\d+", site.module_path if block is None else block))
    inputs, outputs = site.in_features, site.out_features
    return HypernetworkParts(
        surgeon.own("network", lambda: LoRANetwork(config)),
        surgeon.own(part_name("layer", stack, layer), lambda: LayerEmbedding(config)),
        surgeon.own(kind_name(site), lambda: Kind(inputs, outputs, config)),
        alike,
    )


class TextToLoRAOperator(Operator):
    """The LoRA of one site, which the shared network computes from the call's vector."""

    training_only = Operator.training_only | {"decay"}

    def __init__(self, site: Site, config: TextToLoRAConfig, known: HypernetworkParts) -> None:
        super().__init__(site)
        self.known, self.told = known, Told(site, config.vector_width)
        self.scale = config.alpha / config.rank**0.5
        self.dropout, self.decay = nn.Dropout(config.dropout), config.decay / known.alike

    def made(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return A ``[n, rank, in]`` and B ``[n, out, rank]`` for vectors ``[n, vector_width]``."""
        kind: Any = self.known.kind.module
        z = self.known.network.module(vectors.to(kind.value), self.known.layer.module.value, kind.value)
        A, B = kind.factors(z)
        return A, B

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., in]
        y = call(x)
        rows = len(x) if x.dim() > 1 else 1
        A, B = self.made(self.told.of_rows(rows))
        if self.training and self.decay:
            forward_context().add_loss(self.decay * (A.square().mean() + B.square().mean()), self)
        A, B = self.cast(y, A, B)
        seen = self.dropout(x).to(y.dtype).reshape(len(A), -1, x.shape[-1])  # rows of one vector lie together
        return y + self.scale * (seen @ A.mT @ B.mT).view(y.shape)


class TextToLoRA(Method):
    """LoRAs that a network computes from vectors that calls pass.

    Example:
        injection = peftcore.apply(model, "text_to_lora", vector_width=384)
        peftcore.call(model, task_vector=torch.randn(1, 384))  # an embedded text, or one for each row
    """

    name = "text_to_lora"
    Config = TextToLoRAConfig
    tags = Tags(category="multitask", paper="2506.06105", random=True, reentrant=False)
    learning_rate = LearningRate(
        2.5e-5, "SakanaAI/text-to-lora@8ba7749, scripts/train_t2l_mistral.sh", on="Mistral 7B Instruct, 479 tasks"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: TextToLoRAConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        for site in sites:
            if not sees_vectors(site):
                raise UnsupportedSite(
                    f"{site.path} is not a linear layer that is called, which a LoRA for each row needs; exclude it"
                )
        alike = Counter(map(kind_name, sites))
        for site in sites:
            known = known_of(surgeon, site, config, alike[kind_name(site)])
            surgeon.graft(site, TextToLoRAOperator, config, known=known)

    @staticmethod
    def parameter_count(site: Site, config: TextToLoRAConfig) -> int:
        return 0


@torch.no_grad()
def make_lora(injection: AppliedMethod, vector: Tensor, name: str = "lora") -> Injection:
    """Return the LoRA that the network computes for one vector ``[vector_width]``. It is installed, frozen, and
    activated instead of the network. The network remains installed.

    Raises:
        ConfigError: the injection is not a text_to_lora, or the vector has another width.
        PeftcoreError: for the same reasons as in `peftcore.lora_of`. Nothing is changed then.
    """
    found = [graft for graft in injection.grafts if isinstance(graft.operator, TextToLoRAOperator)]
    if not found or vector.shape != (injection.config.vector_width,):
        raise ConfigError("make_lora(injection, vector) needs a text_to_lora adapter and a vector of its vector_width")
    made = {}
    with evaluating(injection.shared.values()):
        for graft in found:
            operator: Any = graft.operator
            A, B = operator.made(vector[None])
            made[graft.site.path] = (graft.site, (A[0], B[0], operator.scale))
    return lora_of(injection.model, made, name, [injection.whole.name])
