"""Tiny-attention adapter: an adapter that attends to the other tokens.   Zhao et al. 2022, arXiv 2211.01979.

Equation:
    y = h + W_2 MHA(q, k, v) + b_2,   [q, k, v] = W_1 LN(h) + b_1,   q, k, v [tokens, a],   a = 1

h is the stream after self-attention. In post-norm hosts it is the output of the norm after the attention; in pre-norm
hosts it is the residual sum before the next norm. The authors' code (cindermond/tiny-attn) does the same in its
structure m0 and in GPT-2. By default the method does not act after cross-attention. MHA is torch's multi-head attention
of width a, with its projections and dropout of attention weights. It uses the model's mask: tokens do not attend to
padding, nor to later tokens in causal models. The model's cache stores the keys and values of earlier tokens in
additional layers after the model's own.

With `modules`, n adapters run in sequence, and the output of each is multiplied by 1/n. Parameters: n (4 a d + 4 a^2 +
7 a + 3 d) a layer: 5,387 with a = n = 1 in RoBERTa-base.

Start: W_2 and b_2 start as torch's layers do, multiplied by 0.01. This is nearly an identity; ``out_scale=0`` makes it
exact.

Differs from the authors' code: The authors' code trains n heads and averages their tensors afterwards. Here the n
adapters stay separate.

Use it: `peftcore.apply(model, "tiny_attention_adapter")`, where the task needs additional attention to the context,
with few parameters. It increases latency: it cannot be merged, and runs one more attention in every layer. The similar
`houlsby_adapter` processes each token alone; `lora` can be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    BranchSite,
    Bypass,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    Tap,
    TokenStacks,
    VisibleTokens,
    block_depths,
    cached_tokens,
    stack_path,
)
from peftcore.errors import MissingContext, UnsupportedSite
from peftcore_additive._bottleneck import width_of
from peftcore_additive._side import held_by
from peftcore_additive._tiny_attention import JOINED, Room, TinyAttention, placed

AROUND = "around"
"""The `form` of a site at the block that contains an attention."""


class TinyAttentionAdapterConfig(MethodConfig):
    """Options of the tiny-attention adapter."""

    method: Literal["tiny_attention_adapter"] = "tiny_attention_adapter"
    width: PositiveInt = 1
    """Width a of queries, keys and values, over all heads together."""
    heads: PositiveInt = 1
    """Number of heads; it must divide `width`."""
    modules: PositiveInt = 1
    """The number n of adapters in sequence; the output of each is multiplied by 1/n."""
    dropout: Share = 0.1
    """Probability with which attention weights are dropped in training."""
    out_scale: NonNegativeFloat = 0.01
    """Factor on the start of W_2 and b_2; 0 makes a fresh adapter an exact identity."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        return self


class TinyAttentionOperator(Bypass):
    """Runs the tiny attentions after the attention of one block. In post-norm hosts they act after the norm that
    follows the attention, in other hosts at the end of the attention's branch."""

    observes = Bypass.observes | {AROUND}

    def __init__(
        self,
        site: BranchSite,
        config: TinyAttentionAdapterConfig,
        block: Site,
        depth: int,
        blocks: int,
        visible: VisibleTokens,
        sums: bool,
    ) -> None:
        super().__init__(site)
        if site.order is not None:
            raise UnsupportedSite(
                f"{site.path}: the attention's output has another order of dimensions than the stream; exclude it"
            )
        self.names, self.depth = block.arguments, depth
        self.visible, self.sums = visible, sums
        self.series = nn.ModuleList(TinyAttention(width_of(site), config) for _ in range(config.modules))
        self.joined = any(place.form == JOINED for place in site.places)
        self.around, self.room = Tap(), Room(config.modules, blocks)

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        if form == AROUND:
            return self._at_block
        if form == JOINED:
            return self._at_joined
        return (lambda call, *args, **kwargs: call(*args, **kwargs)) if self.joined else super().at(form, module)

    def _at_block(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names[1:], args, strict=False)), **kwargs}
        self.around.put((given, cached_tokens(given, self.depth, x.shape[1])))  # before the block adds its own
        return call(x, *args, **kwargs)

    def _at_joined(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        return y + self.added(y)

    def _at_first(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        norm = self.norm.get()
        if norm is not None and norm[1] is not x:
            raise UnsupportedSite(
                f"{type(self).__name__}: the attention's input differs from the output of the norm in front of it; "
                "exclude this block"
            )
        return super()._at_first(call, x, *args, **kwargs)

    def join(self, h: Tensor, read: Tensor | None, end: Callable[..., Any] | None) -> Tensor:
        assert read is not None
        return h + self.added(h if self.sums else read.to(h.dtype) + h)

    def added(self, h: Tensor) -> Tensor:
        """Return the term that the tiny attentions add to the stream ``[batch, tokens, d]``.

        Raises:
            MissingContext: the attention was called directly, outside of its block.
        """
        around = self.around.get()
        if around is None:
            raise MissingContext("the attention was called by itself; call its block, which receives masks and caches")
        given, held = around
        caches = self.room.layers(given)
        visible = self.visible.mask(held_by(caches, held), h.shape[1], given, h.device)
        start = y = h.to(self.series[0].up.weight.dtype)  # type: ignore[arg-type,union-attr]
        for each, cache in zip(self.series, caches or repeat(None, len(self.series)), strict=True):
            y = y + each(y, visible, cache) / len(self.series)
        return (y - start).to(h.dtype)


class TinyAttentionAdapter(Method):
    """A very narrow attention after each self-attention."""

    name = "tiny_attention_adapter"
    Config = TinyAttentionAdapterConfig
    tags = Tags(
        category="additive",
        paper="2211.01979",
        identity_at_init=False,
        identity_options={"out_scale": 0.0},
        random=True,
    )
    learning_rate = LearningRate(8e-4, "cindermond/tiny-attn@03eee7e, run_examples.sh", on="RoBERTa-large, SST-2")
    target = ("attn.output",)

    def inject(self, model: nn.Module, config: TinyAttentionAdapterConfig, surgeon: Surgeon) -> None:
        stacks, depths, resolver = TokenStacks(surgeon), block_depths(surgeon), surgeon.resolver
        for site in surgeon.sites():
            entries = resolver.host.at(site.module_path)
            if surgeon.wishes.target is None and any(each.role.startswith("cross") for each in entries):
                continue  # by default behind self-attention alone
            entry = next((each for each in entries if each.role in ("attn", "attn.out")), None)
            path = None if entry is None else entry.block
            if path is None or path == site.module_path or resolver.host.on_grid(path):
                raise UnsupportedSite(
                    f"{site.path} is not the output of a self-attention in a block of tokens; target attn.output"
                )
            block = replace(resolver.site(path, "weight", "block"), form=AROUND)
            blocks = sum(stack_path(other or "") == stack_path(path) for other in depths)
            visible = VisibleTokens(stacks.of(site))
            place, sums = placed(surgeon, site)
            around = {"block": block, "depth": depths[path], "blocks": blocks, "visible": visible, "sums": sums}
            surgeon.graft(place, TinyAttentionOperator, config, (*place.places, block), **around)

    @staticmethod
    def parameter_count(site: Site, config: TinyAttentionAdapterConfig) -> int:
        a, d = config.width, width_of(site)
        return config.modules * (4 * a * d + 4 * a * a + 7 * a + 3 * d)
