"""HyperFormer and HyperFormer++: adapters that a network makes for each task.   Karimi Mahabadi et al. 2021, arXiv
2106.04489 (code: rabeehk/hyperformer).

Equation:
    y = h + gain * norm(W_up f(W_down h + b_down) + b_up) + shift,   norm: to mean 0 and variance 1
    W_down = D z,  b_down = d z,  W_up = U z,  b_up = u z,  gain = G z,  shift = S z,      each with a bias
    z = LN(P2 relu(P1 [e_task ; e_layer ; e_place]))      HyperFormer++: one network for all adapters of a stack
    z = P2 relu(P1 e_task)                                 HyperFormer (shared=False): D to S are each adapter's own

h is the output of the last matrix of self-attention or of the feed-forward; cross-attention gets no adapter, unless it
is named as a target. Encoder and decoder have separate networks, but share the embeddings of tasks. If the adapters of
a stack have several widths, each width has a separate network. e_place is the embedding of the adapter's place in its
block. All norms of the host train too.

The call passes the task by ``with peftcore.call(model, task=...)``: one task for all rows, or one for each row. The
network computes the adapter of each row's task, or of all tasks if there are fewer tasks than rows.

Parameters of HyperFormer++: tasks * t once; for each stack (layers + places) * t, (3t + 1) h + (h + 1) p + 2p and (p +
1) (2 d r + r + 3 d). Of HyperFormer: tasks * t + (t + 1) h + (h + 1) p once, (p + 1) (2 d r + r + 3 d) per adapter.

Start: Embeddings from N(0, 1), the rest from N(0, 0.01) with biases at zero. A fresh adapter is near the identity.
``gain_std=0`` makes the start an exact identity.

Differs from the authors' code: The authors' batches have one task; here each row may have its own. The file
configs/hyperformer.json of that code is neither of the two methods: it has one network for each stack, with separate
generators for attention and feed-forward. shared=False is the HyperFormer of the paper, which the code calls
meta-adapter.

Use it: `peftcore.apply(model, "hyperformer_pp", tasks=["sums", "letters"])`, for many tasks, some of them with few
examples: a new task adds t parameters. Not for tasks with little in common, where separate adapters
(`pfeiffer_adapter`) are better, nor where the adapter has to be merged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    ACTIVATIONS,
    OUTPUTS,
    AtBranchEnd,
    Joins,
    LearningRate,
    Method,
    Shared,
    Site,
    Surgeon,
    Tags,
    branch_end,
    stack_path,
)
from peftcore_multitask._part_names import part_name
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count


class HyperFormerConfig(TaskConfig):
    """Options of HyperFormer."""

    overridable = ("activation", "joins")

    method: Literal["hyperformer_pp"] = "hyperformer_pp"
    shared: bool = True
    """True: one network for all adapters of a stack (HyperFormer++). False: each adapter has its own generators
    (HyperFormer)."""
    bottleneck: PositiveInt = 24
    """Width r of the adapters; a 32nd of the hidden size in the authors' configuration."""
    task_width: PositiveInt = 64
    """Width t of the embeddings of tasks, and of layers and places."""
    hidden: PositiveInt = 128
    """Hidden width h of the network that reads the embeddings."""
    code: PositiveInt = 64
    """Width p of z, from which the adapters are computed."""
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "gelu_tanh"
    """The non-linearity f."""
    joins: Joins = "matrix"
    """Where an adapter reads and adds. "matrix": at the output of a branch's last matrix. "stream": after the host's
    dropout, layer scale and stochastic depth on the branch's output."""
    init_std: NonNegativeFloat = 0.01
    """Standard deviation of all matrices at the start."""
    gain_std: NonNegativeFloat = 0.01
    """Standard deviation of the matrices that compute gain and shift; 0 makes a fresh adapter an exact identity."""
    train_layer_norm: bool = True
    """Train the norms of the host too, as the authors do."""


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear


class Reader(nn.Module):
    """The network from embeddings to z."""

    def __init__(self, embeddings: int, config: HyperFormerConfig) -> None:
        super().__init__()
        self.first = _linear(embeddings * config.task_width, config.hidden, config.init_std)
        self.second = _linear(config.hidden, config.code, config.init_std)

    def forward(self, embedding: Tensor) -> Tensor:
        """Return z ``[..., p]`` of concatenated embeddings."""
        z: Tensor = self.second(self.first(embedding).relu())
        return z


class TaskTable(nn.Module):
    """The embeddings of tasks, and with `shared=False` the network that computes z from them."""

    def __init__(self, config: HyperFormerConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(task_count(config), config.task_width))
        self.reader = None if config.shared else Reader(1, config)


class Generators(nn.Module):
    """The linear maps that compute the weights of an adapter from z."""

    def __init__(self, width: int, config: HyperFormerConfig) -> None:
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

    def __init__(self, config: HyperFormerConfig) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(config.task_width))


class Network(Generators):
    """The network of a stack, which computes adapters from the embeddings of task, layer and place."""

    def __init__(self, width: int, config: HyperFormerConfig) -> None:
        super().__init__(width, config)
        self.reader = Reader(3, config)
        self.norm = nn.LayerNorm(config.code, eps=1e-6)

    def code(self, tasks: Tensor, layer: Tensor, place: Tensor) -> Tensor:
        """Return z ``[tasks, p]``."""
        here = torch.cat([layer, place]).expand(len(tasks), -1)
        z: Tensor = self.norm(self.reader(torch.cat([tasks, here], -1)))
        return z


@dataclass(frozen=True)
class HyperFormerParts:
    """Parts that a site shares with others: the network of its stack, and the embeddings of its layer and its place."""

    network: Shared
    layer: Shared
    place: Shared


def known_of(surgeon: Surgeon, site: Site, config: HyperFormerConfig) -> HyperFormerParts:
    """Return the parts that a site shares with other sites. Their names depend only on the path of the site. Blocks
    whose paths differ only in numbers form a stack. The numbers in a block's path name the layer, and the site's path
    without numbers names the place."""
    path, width = site.module_path, site.out_features
    block = next((each.block for each in surgeon.resolver.host.at(path) if each.block is not None), None)
    stack = "" if block is None else stack_path(block)
    layer = ".".join(re.findall(r"\d+", path if block is None else block))
    return HyperFormerParts(
        surgeon.own(part_name("network", stack, str(width)), lambda: Network(width, config)),
        surgeon.own(part_name("layer", stack, layer), lambda: Embedding(config)),
        surgeon.own(part_name("place", stack_path(path)), lambda: Embedding(config)),
    )


class HyperFormerOperator(AtBranchEnd):
    """The adapter of one site. It lacks tensors if a shared network computes its weights."""

    def __init__(self, site: Site, config: HyperFormerConfig, table: Shared, known: HyperFormerParts | None) -> None:
        super().__init__(site)
        self.table, self.known = table, known
        self.own = Generators(site.out_features, config) if known is None else None
        self.activation, self.tasks = ACTIVATIONS[config.activation](), Tasks(site, config)

    def weights(self, rows: int) -> tuple[Tensor, ...]:
        """Return the adapter weights of each row, ``[rows or 1, ...]``. If there are fewer tasks than rows, they are
        computed once for each task."""
        table = self.table.module
        chosen = self.tasks.of_rows(torch.arange(len(table.embedding), device=table.embedding.device), rows)
        fewer = len(chosen) > len(table.embedding)
        embedding = table.embedding if fewer else table.embedding[chosen]
        if self.known is not None:
            network = self.known.network.module
            made = network(network.code(embedding, self.known.layer.module.value, self.known.place.module.value))
        else:
            assert self.own is not None, "nothing is shared"
            made = self.own(table.reader(embedding))
        return tuple(each[chosen] for each in made) if fewer else made

    def adapt(self, h: Tensor) -> Tensor:
        x = self.layer.channels_last(h)  # [rows, ..., d]
        rows = self.layer.rows(h)
        down, down_bias, up, up_bias, gain, shift = self.cast(h, *self.weights(rows))
        inner = self.activation(x.reshape(rows, -1, x.shape[-1]) @ down.mT + down_bias)  # [rows, positions, r]
        made = nn.functional.layer_norm(inner @ up.mT + up_bias, x.shape[-1:])
        return h + self.layer.channels_back((made * gain + shift).view(x.shape))


class HyperFormer(Method):
    """Adapters whose weights a network computes from an embedding of the task.

    Example:
        injection = peftcore.apply(model, "hyperformer_pp", tasks=["sums", "letters"])
        peftcore.call(model, task="sums")  # or a list, one for each row; with `with`, for a while
    """

    name = "hyperformer_pp"
    Config = HyperFormerConfig
    tags = Tags(category="multitask", paper="2106.04489", identity_at_init=False, identity_options={"gain_std": 0.0})
    learning_rate = LearningRate(
        3e-4, "rabeehk/hyperformer@56b0f99, hyperformer/configs/hyperformer++.json", on="T5-base, GLUE"
    )
    target = ("attn.output", "mlp.output")
    alternatives = OUTPUTS

    def inject(self, model: nn.Module, config: HyperFormerConfig, surgeon: Surgeon) -> None:
        sites = [site for site in surgeon.sites() if not _by_role_in_cross(surgeon, site)]
        table = surgeon.own("tasks", lambda: TaskTable(config))
        for site in sites:
            known = known_of(surgeon, site, config) if config.shared else None
            place = branch_end(surgeon, site, config.at(site.path).joins)
            surgeon.graft(place, HyperFormerOperator, config, place.places, table=table, known=known)
        for site in surgeon.at("norm.*") if config.train_layer_norm else ():
            surgeon.train(site.module_path)

    @staticmethod
    def parameter_count(site: Site, config: HyperFormerConfig) -> int:
        if site.form == "weight":  # a norm's gain or bias
            return site.numel
        d, r = site.out_features, config.bottleneck
        return 0 if config.shared else (config.code + 1) * (2 * d * r + r + 3 * d)


def _by_role_in_cross(surgeon: Surgeon, site: Site) -> bool:
    """Return whether a site ends a cross-attention and is a target only by the role that all attentions share."""
    families = {entry.role.partition(".")[0] for entry in surgeon.resolver.host.at(site.module_path)}
    return site.role == "attn.output" and "cross" in families
