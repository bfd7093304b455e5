"""Prompt tuning.   Lester et al. 2021, arXiv 2104.08691.

    X' = [P ; E(ids)],   P [length, d]

With `rank` it is DPT (Xiao et al. 2023, arXiv 2310.10094; code XYaoooo/DPT): P = A B, A [length, rank], B [rank, d],
both uniform in +-0.5 at the start, so that neither holds the other at zero.

P stands in front of the embedded tokens, behind any scaling of the embeddings, and sees what tokens there would see.
Outputs have the shape they have without it: its rows are dropped before anything scores or pools, so labels need no
change, and the loss counts what the tokens predict. (Other implementations also count how the last row of P predicts
the first token.) Where a sequence of a batch is padded on the left, P stands behind the padding, and the sequence gives
what it gives alone. (Others put P before it, further from the tokens.) In encoder-decoder models P stands in the
encoder, and the decoder attends to it.

Never identity at the start: anything in front moves the outputs. P starts as embeddings of tokens drawn from the
vocabulary, none twice where there are enough (the authors draw from its first 5,000), of given tokens, or uniform in
+-0.5. Parameters: length * d; rank * (length + d) with a rank.

Use it on large models, where it comes close to full fine-tuning with a few thousand numbers; the paper trains with a
learning rate of 0.3. A rank makes a long prompt small; in a short one it saves little.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    LearningRate,
    Method,
    MethodConfig,
    SequenceOperator,
    SequenceSite,
    Site,
    Surgeon,
    Tags,
    full_precision,
)
from peftcore_additive._rows import embedded_tokens


class Config(MethodConfig):
    """Options of prompt tuning."""

    method: Literal["prompt_tuning"] = "prompt_tuning"
    length: PositiveInt = 20
    """Rows of the prompt."""
    init: Literal["vocabulary", "uniform"] = "vocabulary"
    """Start from embeddings of tokens drawn from the vocabulary, or uniform in +-0.5."""
    init_ids: list[NonNegativeInt] = Field(default_factory=list)
    """Start from the embeddings of these tokens instead (a text, the names of the classes), repeated or cut to the
    prompt's length."""
    behind_embeddings: bool = False
    """Put P behind all that makes embeddings of tokens, so that its rows have no positions and meet no norm, and tokens
    keep their positions: what the adapters package does; for encoders alone."""
    rank: PositiveInt | None = None
    """Make P of two factors of this rank; they start uniform, so it wants ``init="uniform"``. None trains P itself."""

    @model_validator(mode="after")
    def _factors_start_uniform(self) -> Self:
        if self.rank is not None and (self.init != "uniform" or self.init_ids):
            raise ValueError('factors of a rank start uniform, and not as tokens: say init="uniform", and no init_ids')
        return self


class PromptOperator(SequenceOperator):
    """The prompt of one stack, or its factors."""

    prompt: nn.Parameter

    def __init__(self, site: SequenceSite, config: Config) -> None:
        super().__init__(site, config.length)
        self.rank = config.rank
        if config.rank is not None:
            self.A = nn.Parameter(torch.rand(config.length, config.rank) - 0.5)
            self.B = nn.Parameter(torch.rand(config.rank, self.width) - 0.5)
            return
        if config.init == "vocabulary" or config.init_ids:
            start = embedded_tokens(site, config.length, config.init_ids)
        else:
            start = torch.rand(config.length, self.width) - 0.5
        self.prompt = nn.Parameter(start)

    def rows(self, embeds: Tensor) -> Tensor:
        if self.rank is None:
            return self.prompt
        with full_precision(embeds):
            return self.A @ self.B


class PromptTuning(Method):
    """A trained prompt in front of the embedded tokens."""

    name = "prompt_tuning"
    Config = Config
    tags = Tags(category="additive", paper="2104.08691", identity_at_init=False, per_row=False)
    learning_rate = LearningRate(
        0.3,
        "google-research/prompt-tuning@72285ee, prompt_tuning/configs/runs/prompt_finetune.gin",
        on="T5 1.1 of all sizes",
        optimizer="Adafactor",
    )
    target = "stack"

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.sequence(site, PromptOperator, config, behind=config.behind_embeddings)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        if config.rank is not None:
            return config.rank * (config.length + site.out_features)
        return config.length * site.out_features
