"""Textual inversion: new words for a text encoder.   Gal et al. 2022, arXiv 2208.01618.

Equation:
    E'[tokens] = v,   E' = E in all other rows,   v [n, dim] = E[tokens], or E[initializer], at the start

Only v trains, with the loss of the frozen diffusion model. First add the new words to the tokenizer as placeholder
tokens, with `add_tokens`, and call ``text_encoder.resize_token_embeddings(len(tokenizer))``; then apply the method to
the text encoder, or to both text encoders of SDXL. The prompt has to contain all placeholders of a word. v is a
separate parameter, so weight decay, the optimizer's moments and the file cover only its n rows. v is in float32 by
default, for any dtype of the encoder: half precision is too coarse for the small steps of training.

The method can be merged. If the table is also the head of the model, both use v.

Parameters: n * dim.

Start: v starts as the current embeddings of its tokens, which is an identity, or as the embedding of `initializer`.

Differs from the authors' code: The authors' code was not compared. The script of diffusers trains the whole table and
writes the other rows back after each step; here v is a separate parameter.

Use it: `peftcore.apply(model, "textual_inversion", tokens=[5], initializer=7)`, to teach a subject or a style as a
word: the file is a few kilobytes, and the model does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags, Transposed
from peftcore.errors import UnsupportedSite
from peftcore_diffusion._ties import alike, foremost, holders, stored_as


class WordsConfig(MethodConfig):
    """Options of methods that train words."""

    tokens: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [-1])
    """Ids of the placeholder tokens, one for each vector. Negative ids count from the end of the table, where
    `resize_token_embeddings` adds new rows."""
    initializer: NonNegativeInt | None = None
    """Token id of a word of similar meaning, whose embedding all vectors start from. If None, each vector starts from
    the current embedding of its placeholder token."""


class TextualInversionConfig(WordsConfig):
    """Options of textual inversion."""

    method: Literal["textual_inversion"] = "textual_inversion"
    words: list[str] = Field(default_factory=list)
    """Names under which files of other programs store the words, one name for each token. All tokens of a word have the
    same name."""

    @model_validator(mode="after")
    def _named(self) -> TextualInversionConfig:
        if self.words and len(self.words) != len(self.tokens):
            raise ValueError(
                f"words= has {len(self.words)} names, but tokens= has {len(self.tokens)} ids; pass one name for each id"
            )
        return self


def _rows(site: Site, config: WordsConfig) -> list[int]:
    """Return the token ids as non-negative numbers, after checking them against the size of the table."""
    size = site.in_features
    rows = [token + size if token < 0 else token for token in config.tokens]
    wrong = [token for token in (*rows, config.initializer or 0) if not 0 <= token < size]
    if wrong or len(set(rows)) < len(rows):
        reason = (
            f"has {size} rows, none for {wrong}: resize the table first" if wrong else "has a token twice in tokens="
        )
        raise UnsupportedSite(f"{site.path} {reason}")
    return rows


class TextualInversionOperator(Operator):
    """Replaces the embeddings of the placeholder tokens by trained vectors."""

    tokens: Tensor

    def __init__(self, site: Site, config: WordsConfig) -> None:
        super().__init__(site)
        if not site.layer.one_hot:
            raise UnsupportedSite(
                f"{site.path} is not a token embedding; target the embedding table of the text encoder"
            )
        rows, table = _rows(site, config), site.weight().detach()  # [dim, num]
        self.register_buffer("tokens", torch.tensor(rows), persistent=False)
        start = rows if config.initializer is None else [config.initializer] * len(rows)
        self.vectors = nn.Parameter(table[:, torch.tensor(start, device=table.device)].mT.contiguous())  # [n, dim]

    def forward(self, call: Callable[..., Tensor], ids: Tensor) -> Tensor:
        y = call(ids)
        hits = ids.unsqueeze(-1) == self.tokens  # [..., n]
        (vectors,) = self.cast(y, self.vectors)
        new = nn.functional.embedding(hits.int().argmax(-1), vectors)
        return torch.where(hits.any(-1, keepdim=True), new, y)

    def merged(self, weight: Tensor) -> Tensor:
        return weight.index_copy(1, self.tokens, self.vectors.mT.to(weight.dtype))


def learn_words(
    surgeon: Surgeon, sites: Iterable[Site], operator: Callable[..., Operator], config: MethodConfig
) -> None:
    """Install the operator of trained words at token tables; modules that share a table share one operator."""
    for group in alike(sites):
        held = holders(surgeon, group[0])
        site = foremost([each for each in held if each.layer.one_hot] or group)
        rest = (each for each in held if each.path != site.path)
        others = (each if each.layer.one_hot else stored_as(each, Transposed()) for each in rest)
        surgeon.graft(site, operator, config, tuple(others))


class TextualInversion(Method):
    """Train the embeddings of new words.

    Example:
        injection = peftcore.apply(model, "textual_inversion", tokens=[5], initializer=7)  # ids of the tokenizer
    """

    name = "textual_inversion"
    Config = TextualInversionConfig
    tags = Tags(category="diffusion", paper="2208.01618", mergeable=True)
    learning_rate = LearningRate(
        0.04, "arXiv 2208.01618, implementation details", on="latent diffusion of 1.4B, batches of 8"
    )
    target = ("embed",)

    def inject(self, model: nn.Module, config: TextualInversionConfig, surgeon: Surgeon) -> None:
        learn_words(surgeon, surgeon.sites(), TextualInversionOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: TextualInversionConfig) -> int:
        return len(config.tokens) * site.out_features
