"""LongLoRA: LoRA for longer contexts, trained with shifted short attention.   Chen et al. 2023, arXiv 2309.12307.

Equation:
    y = W x + b + s B A dropout(x),   s = alpha / rank        at the matrices of attention; norms and embeddings train
    attention in training:  token i sees token j <= i  if  floor(i / G) = floor(j / G)              in heads 1 to H/2
                                                       if  floor(i / G + 1/2) = floor(j / G + 1/2)  in all others

The group size G is `group_ratio` times the number of tokens N (at least 2), or `group_size`. Groups are used in every
attention that contains a target matrix. They reduce the cost of attention from N^2 to N G, and half of the heads pass
information across the borders of groups. In evaluation there are no groups: every token attends to all tokens that the
model allows. So flash attention and caches work in a merged or deployed model.

Shifted heads begin and end with half a group, as in the authors' version for flash attention (dvlab-research/LongLoRA).
Lengths that are not a multiple of G have a shorter last group. Padding is masked as usual, but counts as tokens of
groups.

Positions beyond those of pretraining need an option of the host's config, which is separate from the adapter (the paper
interpolates positions by rope_scaling). Attentions must use "eager" or "sdpa". Both groupings are computed for all
heads, and half of the heads of each are used. So hosts with shared keys, sinks or biases of heads need no special code.
Torch's own nn.MultiheadAttention is refused.

Parameters: rank * (in + out) a matrix, and the parameters of the norms and of the token embedding.

Start: A and B as in `lora`, norms and embeddings at the values of the model: an identity in evaluation. In training the
groups change outputs.

Differs from the authors' code: The authors' version without flash attention shifts tokens cyclically, so that the first
half group attends to the last one, which comes later in the text. The authors' code for plain text refuses lengths that
are not a multiple of G. Their code for instruction data has a shorter last group, as here.

Use it: `peftcore.apply(model, "longlora")`, to train on texts that are several times as long as those of pretraining.
For shorter texts `lora` is simpler, and trains with the same attention that evaluation uses.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    Attend,
    AttentionOperator,
    AttentionSite,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
)
from peftcore.errors import SequenceError, UnsupportedSite
from peftcore_reparameterized import lora
from peftcore_reparameterized._low_rank import low_rank_count


class LongLoRAConfig(MethodConfig):
    """Options of LongLoRA."""

    method: Literal["longlora"] = "longlora"
    rank: PositiveInt = 8
    """Rank of the update."""
    alpha: PositiveFloat = 16.0
    """Numerator of the scale ``alpha / rank``."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    group_ratio: Annotated[NonNegativeFloat, Field(gt=0.0, le=1.0)] = 0.25
    """Size of a group, as a share of the number of tokens."""
    group_size: Annotated[int, Field(ge=2)] | None = None
    """Number of tokens of a group, for texts of any length. With None, `group_ratio` determines it."""
    train_norms: bool = True
    """Train the norms."""
    train_embeddings: bool = True
    """Train the token embedding."""


class ShiftedOperator(AttentionOperator):
    """Restricts one attention to groups of tokens, in training only. In half of the heads, the groups begin half a
    group later.

    Raises:
        SequenceError: in training, tokens attend to keys of another sequence or of a cache.
    """

    trains_only = True

    def __init__(self, site: AttentionSite, config: LongLoRAConfig) -> None:
        super().__init__(site)
        self.ratio, self.size = config.group_ratio, config.group_size

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self.training:
            return attend(query, key, value)
        tokens = query.shape[2]
        if attend.keys != tokens:
            raise SequenceError(
                f"{tokens} training tokens attend to {attend.keys} keys, of a cache or another sequence, but groups "
                "need one sequence that attends to itself; pass whole texts, or call eval() for generation"
            )
        size = max(2, int(tokens * self.ratio)) if self.size is None else self.size
        starts = (range(0, tokens, size), (0, *range(size // 2, tokens, size)))
        plain, shifted = (
            torch.cat(
                [attend.among(start, stop, query, key, value) for start, stop in pairwise((*groups, tokens))], dim=2
            )
            for groups in starts
        )
        first = query.shape[1] // 2
        return torch.cat([plain[:, :first], shifted[:, first:]], dim=1)


class LongLoRA(Method):
    """LoRA with trained norms and embeddings, and with attention in shifted groups during training."""

    name = "longlora"
    Config = LongLoRAConfig
    tags = Tags(category="reparameterized", paper="2309.12307", mergeable=True, low_rank=True)
    learning_rate = LearningRate(
        2e-5, "dvlab-research/LongLoRA@d4eb344, README.md", on="Llama 2 7B, RedPajama, texts of 8,192 tokens"
    )
    target = ("attn.q", "attn.k", "attn.v", "attn.out")

    def inject(self, model: nn.Module, config: LongLoRAConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        for site in sites:
            surgeon.graft(site, lora.LoRAOperator, _lora(config.at(site.path)))
        resolver, found = surgeon.resolver, False
        for core, _ in resolver.host.select("attn.core"):
            inside = [site for site in sites if f"{site.module_path}.".startswith(f"{core.module}.")]
            if any(site.form == "weight" for site in inside):
                raise UnsupportedSite(
                    f"{core.module} reads its matrices without calling them, so rows of a batch cannot be told apart "
                    "in it; target the matrices of other attentions"
                )
            if inside:
                found = True
                surgeon.attention(resolver.site(core.module, "weight", core.role), ShiftedOperator, config)
        if not found:
            raise UnsupportedSite(
                f"{sites[0].path} and other targets belong to no attention that can be grouped; use lora"
            )
        trained = ["norm.*"] * config.train_norms + ["embed"] * config.train_embeddings
        for path in {site.module_path: None for role in trained for site in surgeon.at(role)}:
            surgeon.train(path)

    @staticmethod
    def parameter_count(site: Site, config: LongLoRAConfig) -> int:
        if isinstance(site, AttentionSite):
            return 0
        if len(site.weight_shape) == 1 or (site.layer_of(site.module, site.tensor).one_hot and config.train_embeddings):
            return site.numel
        return low_rank_count(site, config.rank)


def _lora(config: LongLoRAConfig) -> lora.LoRAConfig:
    return lora.LoRAConfig(rank=config.rank, alpha=config.alpha, dropout=config.dropout)
