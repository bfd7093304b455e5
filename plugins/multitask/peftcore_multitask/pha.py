"""PHA: adapters that a network makes of prototypes of tasks.   Zhao et al. 2023, arXiv 2310.11670 (Bumble666/PHA).

Equation:
    y = FFN(x) + W_up relu(W_down x + b_down) + b_up
    W_down = D c,  b_down = d c,  W_up = U c,  b_up = u c, each with a bias;   c = LN(P2 relu(P1 [k_task ; e_layer]))
    v = R2 relu(R1 mean(H)),    s(a, b) = cos(a, b) / temperature
    loss = contrast * mean_i(L_i + M_i),    M_i = log sum_{k of other tasks} exp s(v_i, k) - s(v_i, k_task)
    L_i = mean_j log sum_{l != i} exp s(v_i, v_l) - s(v_i, v_j),    rows j != i of the same task; L over rows with such

x is the feed-forward's input, after its norm. The adapter's output is added to the residual stream after the host's
dropout, as in the authors' code. k [tasks, t] are the prototypes. v is the vector of a text, which the *retriever*
computes from the hidden states H of the text at the end of the stack. Padding is left out. In a causal stack, only
tokens before the first label count, or the first tokens up to a length that ``peftcore.call(model, prompt_length=...)``
passes. The losses exist only in training. They pull texts of a task towards each other and towards the prototype of the
task. As in the code, the sum in M leaves out the row's own task. The call passes the task by ``with
peftcore.call(model, task=...)``: one task for all rows, or one for each row. Batches should mix tasks.

In an encoder-decoder, H are the states of the encoder. The network does not compute the encoder's adapters: each of
them has separate matrices, the same for all tasks. In a model without tokens (for pictures), H is the output of the
norm after the blocks, or the last adapter's input if the model lacks that norm. Adapters of one width share P1 to U.

Parameters: tasks t for prototypes, (d + t + 1) h + t for the retriever, (2t + 1) h + (h + 1) p + 2p and (p + 1) (2 d r
+ r + d) for each width d, t for a made adapter and 2 d r + r + d for an encoder's.

Start: The maps that compute weights are uniform in +-init_scale sqrt(3 / (p fan)), matrices of an encoder's adapters by
Xavier's rule times 1e-4. A fresh adapter is near the identity.

Differs from the authors' code: The paper starts a new task from the nearest prototype; neither the authors' code nor
this method does.

Use it: `peftcore.apply(model, "pha", tasks=["sums", "letters"])`, for several tasks with few examples each, if the
texts identify the task; not for tasks that share inputs (the similar `hyperformer_pp` lacks such losses), nor for one
task (`parallel_adapter`).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    OUTPUTS,
    BranchSite,
    Bypass,
    LearningRate,
    Method,
    Operator,
    PromptPositions,
    Shared,
    Site,
    Surgeon,
    Tags,
    TokenStack,
    TokenStacks,
    branch,
    by_row,
    forward_context,
    full_precision,
)
from peftcore_additive._bottleneck import cast_linear
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count


class Prototypes(nn.Module):
    """A vector of each task, ``[tasks, t]``."""

    def __init__(self, config: PHAConfig) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(task_count(config), config.task_width))


class Hypernetwork(nn.Module):
    """The network that computes adapters for one pair of input and output widths."""

    def __init__(self, inputs: int, outputs: int, config: PHAConfig) -> None:
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
        """Return W_down [n, r, in], b_down [n, 1, r], W_up [n, out, r] and b_up [n, 1, out] for prototypes [n, t]."""
        with full_precision(prototypes):
            both = torch.cat([prototypes, place.expand_as(prototypes)], -1)
            z = self.norm(self.second(self.first(both).relu()))
            down, up = self.down(z).unflatten(-1, (-1, self.inputs)), self.up(z).unflatten(-1, (self.outputs, -1))
            return down, self.down_bias(z).unsqueeze(-2), up, self.up_bias(z).unsqueeze(-2)


class Retriever(nn.Module):
    """Computes the vector of a text from its mean hidden state."""

    def __init__(self, width: int, config: PHAConfig) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, config.hidden), nn.Linear(config.hidden, config.task_width)

    def forward(self, mean: Tensor) -> Tensor:
        """Return ``[rows, t]`` of means ``[rows, width]``."""
        vector: Tensor = self.second(self.first(mean).relu())
        return vector


class Contrast:
    """Adds the contrastive losses of a batch to the loss of the model, from hidden states that an operator passes."""

    def __init__(self, site: Site, config: PHAConfig, retriever: Shared, prototypes: Shared) -> None:
        self.retriever, self.prototypes, self.tasks = retriever, prototypes, Tasks(site, config)
        self.factor, self.temperature = config.contrast, config.temperature

    def add(self, operator: Operator, states: Tensor, counts: Tensor | None) -> None:
        """Add the loss for states ``[rows, tokens, width]`` that an operator passes. `counts` ``[rows, tokens]`` are
        the weights of the tokens; None weights all tokens equally."""
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
    """Passes the output of the stack, or of the norm after its last block, to the retriever in training."""

    def __init__(self, site: Site, config: PHAConfig, stack: TokenStack | None, contrast: Contrast) -> None:
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
    """Return the contrastive loss of text vectors ``[rows, t]`` with tasks ``[rows]``. Each vector is compared with
    those of other rows, and with the prototypes ``[tasks, t]``."""
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


class PHAConfig(TaskConfig):
    """Options of PHA."""

    overridable = ()

    method: Literal["pha"] = "pha"
    bottleneck: PositiveInt = 64
    """Width r of the adapters."""
    task_width: PositiveInt = 64
    """Width t of prototypes, of vectors of texts, and of the embeddings of layers."""
    hidden: PositiveInt = 128
    """Hidden width h of the network that reads prototypes, and of the retriever."""
    code: PositiveInt = 64
    """Width p of c, from which the adapters are computed."""
    contrast: NonNegativeFloat = 0.1
    """Factor of both losses; with 0, or a single task, the retriever is left out."""
    temperature: PositiveFloat = 0.1
    """Divides cosines in the losses."""
    init_scale: NonNegativeFloat = 1e-3
    """Scale of the generated weights at the start; with 1 outputs have the variance of inputs."""


@dataclass(frozen=True, eq=False)
class AdapterSite(BranchSite):
    """The site of an adapter."""

    own: bool = False
    """Whether the adapter has its own matrices instead of generated ones."""


class AdapterOperator(Bypass):
    """The adapter of one site. `network` computes its weights; without a network, the adapter has its own matrices."""

    def __init__(
        self,
        site: AdapterSite,
        config: PHAConfig,
        prototypes: Shared,
        network: Shared | None,
        contrast: Contrast | None,
    ) -> None:
        super().__init__(site)
        self.prototypes, self.network, self.contrast, self.tasks = prototypes, network, contrast, Tasks(site, config)
        if network is not None:
            self.place = nn.Parameter(torch.randn(config.task_width))
            return
        self.down = nn.Linear(site.width, config.bottleneck)
        self.up = nn.Linear(config.bottleneck, site.out_features)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight, gain=1e-4)
            nn.init.zeros_(linear.bias)

    def beside(self, x: Tensor) -> Tensor:
        if self.contrast is not None and self.training:
            self.contrast.add(self, *by_row(x)[:2])
        if self.network is None:
            return cast_linear(self, self.up, cast_linear(self, self.down, x).relu())
        rows = len(x) if x.dim() > 1 else 1
        down, down_bias, up, up_bias = self.cast(x, *self.made(self.network, rows))
        inner = (x.reshape(rows, -1, x.shape[-1]) @ down.mT + down_bias).relu()  # [rows, positions, r]
        return (inner @ up.mT + up_bias).view(*x.shape[:-1], -1)

    def made(self, network: Shared, rows: int) -> tuple[Tensor, ...]:
        """Return the adapter weights of each row, ``[rows or 1, ...]``. If there are fewer tasks than rows, they are
        computed once for each task."""
        prototypes = self.prototypes.module.value
        chosen = self.tasks.of_rows(torch.arange(len(prototypes), device=prototypes.device), rows)
        if len(chosen) <= len(prototypes):
            return tuple(network.module(prototypes[chosen], self.place))
        return tuple(each[chosen] for each in network.module(prototypes, self.place))


class PHA(Method):
    """Adapters whose weights a network computes from prototypes of tasks, and a retriever whose losses pull texts
    towards the prototype of their task.

    Example:
        injection = peftcore.apply(model, "pha", tasks=["sums", "letters"])
        peftcore.call(model, task="sums")  # or a list, one for each row; with `with`, for a while
    """

    name = "pha"
    Config = PHAConfig
    tags = Tags(category="multitask", paper="2310.11670", identity_at_init=False)
    learning_rate = LearningRate(
        3e-4, "Bumble666/PHA@bbb4169, configs/experiments/glue_t5_base.json", on="T5-base, GLUE"
    )
    target = ("mlp.output",)
    alternatives = OUTPUTS

    def inject(self, model: nn.Module, config: PHAConfig, surgeon: Surgeon) -> None:
        sites, stacks = surgeon.sites(), TokenStacks(surgeon)
        prototypes = surgeon.own("prototypes", lambda: Prototypes(config))
        places = [branch(surgeon, site) for site in sites]
        last: Site = places[-1]
        contrast = None
        if config.contrast and task_count(config) > 1:
            norms = [replace(site, form="activation") for site in surgeon.at("norm.final")]
            stack, end = stacks.reading(sites) or (None, next(iter(norms), None))
            seen, width = (last, places[-1].width) if end is None else (end, end.out_features)
            retriever = surgeon.own("retriever", lambda: Retriever(width, config))
            contrast = Contrast(seen, config, retriever, prototypes)
            if end is not None:
                surgeon.graft(end, ReadingOperator, config, stack=stack, contrast=contrast)
                last = end
        for place in places:
            around = stacks.of(place)
            own = around is not None and bool(around.readers)
            widths = place.width, place.out_features
            build = functools.partial(Hypernetwork, *widths, config)
            network = None if own else surgeon.own("network/{}/{}".format(*widths), build)
            reads = contrast if place is last else None
            made = {"prototypes": prototypes, "network": network, "contrast": reads}
            surgeon.graft(AdapterSite(**vars(place), own=own), AdapterOperator, config, place.places, **made)

    @staticmethod
    def parameter_count(site: Site, config: PHAConfig) -> int:
        if not isinstance(site, AdapterSite):
            return 0  # the stack that the retriever reads
        r = config.bottleneck
        return (site.width + 1) * r + (r + 1) * site.out_features if site.own else config.task_width
