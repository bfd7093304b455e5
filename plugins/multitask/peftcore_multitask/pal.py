"""PALs, projected attention layers.   Stickland and Murray 2019, arXiv 1902.02671 (AsaCooperStickland/Bert-n-Pals).

Equation:
    h' = LN(s + TS_t(h)),   where no norm ends the block s + TS_t(h)
    TS_t(h) = gelu(V_t MHA_t(U_t h + u_t) + v_t),   U_t [a, d],  V_t [d, a]

h is the residual stream in front of a block, s is the sum of stream and branches at the block's end, and t is the task.
U and V, with their biases, are shared by all blocks of a stack; each block has a separate MHA of width a. It has
queries, keys and values with biases, dropout of attention weights, and no output matrix.

MHA uses the model's attention mask: tokens do not attend to padding, nor to later tokens in causal stacks. Its keys and
values of earlier tokens are stored in the model's cache, after those of the model. The call passes the task by ``with
peftcore.call(model, task=...)``: one task for all rows, or one for each row.

Parameters of a task: 2 a d + a + d per stack, 3 a^2 + 3 a per block; 1.8 million in BERT-base.

Start: All matrices from N(0, 0.02), biases at zero. A fresh adapter is near the identity. ``up_std=0`` makes the start
an exact identity.

Differs from the authors' code: The gelu is only in the authors' code, not in the paper, and the code has 6 heads
instead of 12. The authors also train the whole model, or only its norms, for all tasks together; here the model is
frozen, except modules in `train`. Their batches have one task.

Use it: `peftcore.apply(model, "pal", tasks=["sums", "letters"])`, for many tasks on one encoder, where each task should
attend to context differently; not where tasks have few examples and much in common (`hyperformer_pp`), nor where the
adapter has to be merged. `parallel_adapter` is similar, without attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    BlockSite,
    LearningRate,
    Method,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    TokenStacks,
    VisibleTokens,
    block_sites,
    cached_tokens,
    on_first,
)
from peftcore.errors import MissingContext, UnsupportedSite
from peftcore_additive._side import held_by
from peftcore_additive._tiny_attention import Room
from peftcore_multitask._part_names import part_name
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count


class PALConfig(TaskConfig):
    """Options of projected attention layers."""

    overridable = ("heads", "dropout")

    method: Literal["pal"] = "pal"
    width: PositiveInt = 204
    """Width a of the attention, of all heads together."""
    heads: PositiveInt = 6
    """Number of heads; it must divide the width."""
    dropout: Share = 0.1
    """Dropout probability of attention weights."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of U and of the matrices of queries, keys and values at the start."""
    up_std: NonNegativeFloat = 0.02
    """Standard deviation of V at the start; 0 makes a fresh adapter an exact identity."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        return self


ENDING = "ending"
"""The form of a site at a norm that ends a block."""


def ending_norms(surgeon: Surgeon, block: BlockSite) -> tuple[Site, ...]:
    """Return the site of the norm that reads the sum at the end of a block; empty if no norm does.

    Raises:
        UnsupportedSite: the block's code cannot be traced.
    """
    resolver = surgeon.resolver
    inside = [entry for entry in resolver.host.entries if entry.block == block.module_path]
    inside.sort(key=lambda entry: entry.role.startswith("mlp"))  # the feed-forward comes last
    ends = [end for entry in inside if (end := resolver.end_of(entry.module)) is not None]
    if not ends or ends[-1].rest == "unknown":
        raise UnsupportedSite(
            f"{block.path}: its forward cannot be traced to see if a norm ends it; exclude this block"
        )
    norm = ends[-1].entered
    return () if norm is None else (replace(resolver.site(norm, "weight", "norm"), form=ENDING),)


class Projections(nn.Module):
    """U and V of each task, which all blocks of a stack share."""

    def __init__(self, features: int, config: PALConfig) -> None:
        super().__init__()
        tasks, a = task_count(config), config.width
        self.down, self.down_bias = _matrices(tasks, a, features, config.init_std)
        self.up, self.up_bias = _matrices(tasks, features, a, config.up_std)


def _matrices(tasks: int, outputs: int, inputs: int, std: float) -> tuple[nn.Parameter, nn.Parameter]:
    """Return a matrix and a bias for each task."""
    return nn.Parameter(torch.randn(tasks, outputs, inputs) * std), nn.Parameter(torch.zeros(tasks, 1, outputs))


class PALOperator(Operator):
    """The attentions of one block, one for each task."""

    def __init__(self, site: BlockSite, config: PALConfig, shared: Shared, visible: VisibleTokens, norm: bool) -> None:
        super().__init__(site)
        self.names, self.depth, self.path = site.arguments, site.depth, site.path
        self.shared, self.visible, self.tasks = shared, visible, Tasks(site, config)
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv, self.qkv_bias = _matrices(task_count(config), 3 * config.width, config.width, config.init_std)
        self.room, self.found = Room(1, site.blocks), Tap() if norm else None
        if norm:
            self.observes = self.observes | {site.form}

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._at_norm if form == ENDING else self

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names[1:], args, strict=False)), **kwargs}
        held = cached_tokens(given, self.depth, x[0, ..., 0].numel())  # before the block adds its own
        if self.found is None:
            added = self.added(x, given, held)
            return on_first(call(x, *args, **kwargs), lambda y: y + added)
        self.found.put((x, given, held))
        return call(x, *args, **kwargs)

    def _at_norm(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        found = None if self.found is None else self.found.take()
        if found is None:
            raise MissingContext(
                f"the norm of {self.path} was called by itself, without the attention mask: call the whole block"
            )
        return call(x + self.added(*found))

    def added(self, h: Tensor, given: dict[str, Any], held: int) -> Tensor:
        """Return the term that is added to the residual stream ``[batch, ..., d]``, for a block whose cache has `held`
        tokens."""
        tokens, caches = h.flatten(1, -2), self.room.layers(given)
        held = held_by(caches, held)
        visible = self.visible.mask(held, tokens.shape[1], given, h.device)
        each = self.shared.module
        tables = (each.down, each.down_bias, self.qkv, self.qkv_bias, each.up, each.up_bias)
        chosen = self.cast(h, *(self.tasks.of_rows(table, len(h)) for table in tables))
        down, down_bias, qkv, qkv_bias, up, up_bias = chosen  # [batch or 1, ...]
        parts = ((tokens @ down.mT + down_bias) @ qkv.mT + qkv_bias).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # [batch, heads, tokens, a / heads]
        if caches:
            key, value = caches[0].update(key, value)
        dropout = self.dropout if self.training else 0.0
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        return nn.functional.gelu(seen.transpose(1, 2).flatten(-2) @ up.mT + up_bias).view_as(h)


class PAL(Method):
    """A narrow attention for each task, in parallel with every block.

    Example:
        injection = peftcore.apply(model, "pal", tasks=["sums", "letters"])
        peftcore.call(model, task="sums")  # or a list, one for each row; with `with`, for a while
    """

    name = "pal"
    Config = PALConfig
    tags = Tags(
        category="multitask", paper="1902.02671", identity_at_init=False, identity_options={"up_std": 0.0}, random=True
    )
    learning_rate = LearningRate(
        2e-5, "AsaCooperStickland/Bert-n-Pals@9b40f4f, README.md", on="BERT-base trained along, GLUE"
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: PALConfig, surgeon: Surgeon) -> None:
        stacks = TokenStacks(surgeon)
        for site in block_sites(surgeon, each_run=True):
            name, width = part_name("projections", site.stack, str(site.width)), site.width
            shared = surgeon.own(name, functools.partial(Projections, width, config))
            norms, visible = ending_norms(surgeon, site), VisibleTokens(stacks.of(site))
            surgeon.graft(site, PALOperator, config, norms, shared=shared, visible=visible, norm=bool(norms))

    @staticmethod
    def parameter_count(site: Site, config: PALConfig) -> int:
        a = config.width  # U and V belong to no block
        return task_count(config) * (3 * a * a + 3 * a)
