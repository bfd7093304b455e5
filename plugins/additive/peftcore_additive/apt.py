"""APT: adaptive prefix tuning.   Zhang et al. 2023, arXiv 2305.15212.

Equation:
    P_i = lambda_i alpha_i * [P_k, P_v],   alpha_i = sigmoid(W_i h_{i-1})   rows of a prefix, in front of K and V

P_k, P_v are `length` keys and values of layer i, as in p_tuning_v2. W_i [length, d] computes a gate for each row from
the output h_{i-1} of the previous block at the text's first token ([CLS] in the paper's encoders), and the scalar
lambda_i weights all rows of the layer.

With causal attention the first token does not attend to later tokens. So if all texts begin with the same token, all
texts have the same gates; they differ only between layers and rows. Left padding is skipped. The gates' scores are
stored in the model's cache, so in generation the text's first token still determines the gates. Positions, dropout and
the network of `projection` are as in p_tuning_v2.

Parameters: length * (2 d_k + d) + 1 a layer, where d_k is the width of its keys. With `projection`, (projection + 1) *
2 d_k + length d + 1 a layer, and length d_k + (d_k + 1) projection for each stack.

Start: W from N(0, 0.02), so that all gates start near one half, lambda at one, P from N(0, 1). No start is an identity.

Differs from the authors' code: The authors' code is not known. The choice of the token for h, and the start, are our
interpretation of the paper.

Use it: `peftcore.apply(model, "apt")`, for classification and tagging with a frozen encoder, where you do not know in
which layers prefixes help. Not for decoders, where prefix_tuning does the same with fewer parameters; p_tuning_v2 is
the same method without gates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    AttentionSite,
    BlockSite,
    Method,
    MethodConfig,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    TokenStacks,
    VisibleTokens,
    block_around,
    cached_tokens,
)
from peftcore.errors import MissingContext, UnsupportedSite
from peftcore_additive._prefix import PrefixOperator, behind, prefix_count, shared_encoder
from peftcore_additive._side import held_by
from peftcore_additive._tiny_attention import Room


class APTConfig(MethodConfig):
    """Options of APT."""

    method: Literal["apt"] = "apt"
    length: PositiveInt = 20
    """Number of trained keys and values in front of the keys and values of each attention."""
    projection: PositiveInt | None = None
    """Width of the network that generates the keys and values in training; None trains the keys and values directly."""
    dropout: Share = 0.1
    """Dropout probability of the trained keys and values in training."""
    behind: bool = True
    """Start the positions of tokens after the prefix, as if its rows were words."""


class Reader(Operator):
    """Stores a block's input for the gates of its prefix."""

    observes = frozenset({"activation"})

    def __init__(self, site: BlockSite, given: Tap) -> None:
        super().__init__(site)
        self.names, self.depth, self.given = site.arguments, site.depth, given

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names[1:], args, strict=False)), **kwargs}
        self.given.put((x, given, cached_tokens(given, self.depth, x.shape[1])))  # before the block adds its own
        return call(x, *args, **kwargs)


class AdaptivePrefix(PrefixOperator):
    """The prefix of one layer, multiplied by its gates."""

    def __init__(
        self,
        site: AttentionSite,
        config: APTConfig,
        encoder: Shared | None,
        block: BlockSite,
        given: Tap,
        visible: VisibleTokens,
    ) -> None:
        super().__init__(site, config, encoder)
        if "q" not in site.projections or site.projections["q"].in_features != block.width:
            raise UnsupportedSite(
                f"{site.path}: no single matrix computes its queries from its block's input of width {block.width}; "
                "exclude it"
            )
        self.token_gates = nn.Parameter(0.02 * torch.randn(config.length, block.width))
        self.layer_gate = nn.Parameter(torch.ones(1))
        self.given, self.visible, self.room = given, visible, Room(1, block.blocks)

    def made(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return keys and values by heads, ``[batch, kv_heads, length, width]``.

        Raises:
            UnsupportedSite: the block attends within windows, so a gate cannot be assigned to one text.
        """
        opened = self.opened()
        if len(opened) != batch:
            raise UnsupportedSite(
                f"a block of {len(opened)} texts attends within {batch} windows, so a window has no gate of its own; "
                "exclude this block"
            )
        key, value = super().made(batch)  # [batch, kv_heads, length, width]
        return opened * key, opened * value

    def opened(self) -> Tensor:
        """Return the gate of each row of the prefix, ``[batch, 1, length, 1]``.

        Raises:
            MissingContext: the attention was called directly, outside of its block.
        """
        read = self.given.get()
        if read is None:
            raise MissingContext(
                "the attention was called by itself; call its block, from whose input the gates are computed"
            )
        x, given, held = read
        (weight,) = self.cast(x, self.token_gates)
        scores = nn.functional.linear(x, weight)  # [batch, tokens, length]
        caches = self.room.layers(given)
        seen = self.visible.mask(held_by(caches, held), x.shape[1], given, x.device)[:, 0, -1]  # [batch or 1, tokens]
        if caches:
            scores = caches[0].update(scores[:, None], scores[:, None, :, :0])[0][:, 0]
        first = seen.int().argmax(-1).expand(len(scores))
        chosen = scores[torch.arange(len(scores), device=x.device), first]
        gates = self.layer_gate * chosen.to(self.layer_gate.dtype).sigmoid()
        return gates[:, None, :, None]


class APT(Method):
    """Trained keys and values in front of those of every self-attention. Each row has a gate that is computed from the
    text, and each layer has a trained gate."""

    name = "apt"
    Config = APTConfig
    tags = Tags(category="additive", paper="2305.15212", identity_at_init=False, random=True)
    target = ("attn.core",)

    def inject(self, model: nn.Module, config: APTConfig, surgeon: Surgeon) -> None:
        sites, stacks = surgeon.sites(), TokenStacks(surgeon)
        for site in sites:
            block, given = block_around(surgeon, site, each_run=True), Tap()
            visible = VisibleTokens(stacks.of(site))
            surgeon.graft(block, Reader, given=given)
            encoder = shared_encoder(surgeon, surgeon.attention_site(site), config.at(site.path))
            more = {"encoder": encoder, "block": block, "given": given, "visible": visible}
            surgeon.attention(site, AdaptivePrefix, config, **more)
        if config.behind:
            behind(surgeon, sites, config)

    @staticmethod
    def parameter_count(site: Site, config: APTConfig) -> int:
        if not isinstance(site, AttentionSite):
            return 0
        return prefix_count(site, config) + config.length * site.projections["q"].in_features + 1
