"""Trainable tokens: some rows of the table of tokens train.   From peft; there is no paper.

Equation:
    E'[i] = t_i for the given token indices i,   E'[i] = E[i] for all others,   t_i trained, starting from E[i]

E is the token embedding. A head that is tied to it uses the trained rows too, and still adds its bias. The embedding is
not copied to look up rows. A tied head, and embeddings that scale their outputs, run on a copy of E that contains the
trained rows.

Parameters: the number of indices times the width of the embedding.

Start: Trained rows start at the rows of the embedding. A fresh adapter is the identity.

Differs from the authors' code: There is no paper; in peft a tied head is computed without its bias. A file stores the
rows themselves, in ascending order of their indices, not differences from a base: so new tokens have the same
embeddings after loading, regardless of the random start of a resized table.

Use it: `peftcore.apply(model, "trainable_tokens", token_indices=[5, 7])`, to teach a model new tokens (special ones, a
domain's words) while all other tokens keep their embeddings; it combines with another adapter, since it changes only
these rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeInt
from torch import Tensor, nn

from peftcore.author import Layer, LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_selective._ties import one_each, tied_to


def _different(indices: list[int]) -> list[int]:
    if len(set(indices)) != len(indices):
        raise ValueError("token_indices has an index twice")
    return indices


class TrainableTokensConfig(MethodConfig):
    """Options of trainable tokens."""

    method: Literal["trainable_tokens"] = "trainable_tokens"
    token_indices: Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(_different)]
    """The ids of the tokens whose rows train, as in the tokenizer."""


class TokensOperator(Operator):
    """The trained rows that replace rows of an embedding, and their indices."""

    index: Tensor

    def __init__(self, site: Site, config: TrainableTokensConfig) -> None:
        super().__init__(site)
        if site.slices is not None or len(site.weight_shape) != 2:
            raise UnsupportedSite(
                f"{site.path} is not a table with a row for each token; target an embedding or an output layer"
            )
        if max(config.token_indices) >= site.out_features:
            raise UnsupportedSite(
                f"{site.path} has {site.out_features} rows, but token_indices has {max(config.token_indices)}; "
                "resize the table first (resize_token_embeddings)"
            )
        self.padding = site.module.padding_idx if isinstance(site.module, nn.Embedding) else None
        self.register_buffer("index", torch.tensor(sorted(config.token_indices)), persistent=False)
        self.value = nn.Parameter(site.weight().detach()[self.index].clone())  # [tokens, width]

    def forward(self, call: Callable[..., Tensor], ids: Tensor) -> Tensor:
        y = call(ids)
        place = torch.searchsorted(self.index, ids.to(self.index.dtype)).clamp(max=len(self.index) - 1)
        (value,) = self.cast(y, self.value)
        rows = nn.functional.embedding(place, value)  # [..., width]
        if self.padding is not None:  # looked up like all others, but it does not learn from that
            rows = torch.where((ids == self.padding)[..., None], rows.detach(), rows)
        return torch.where((self.index[place] == ids)[..., None], rows, y)

    def merged(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.index, self.value.to(weight.dtype))


class TrainableTokens(Method):
    """Train some rows of the token embedding.

    Example:
        injection = peftcore.apply(model, "trainable_tokens", token_indices=[5, 7])
    """

    name = "trainable_tokens"
    Config = TrainableTokensConfig
    tags = Tags(category="selective", paper="none: huggingface/peft", mergeable=True)
    learning_rate = LearningRate(
        0.2,
        "huggingface/peft@5d602fd, method_comparison/MetaMathQA/experiments/trainable_tokens",
        on="Llama-3.2-3B, MetaMathQA",
    )
    target = "embed"

    def inject(self, model: nn.Module, config: TrainableTokensConfig, surgeon: Surgeon) -> None:
        for site in one_each(surgeon.sites()):
            holders = tuple(_by_rows(each) for each in tied_to(site, surgeon))
            surgeon.graft(_by_rows(site), TokensOperator, config, holders)

    @staticmethod
    def parameter_count(site: Site, config: TrainableTokensConfig) -> int:
        return len(config.token_indices) * site.in_features


def _by_rows(site: Site) -> Site:
    """Return the site with a tensor that has one row for each token, both for an embedding and for a head that is tied
    to it."""
    if site.layer.one_hot:
        return replace(site, layer=Layer())
    return replace(site, form="weight")
