"""Prompt tuning.   Lester et al. 2021, arXiv 2104.08691.

Equation:
    X' = [P ; E(ids)],   P [length, d]

With `rank` it is DPT (Xiao et al. 2023, arXiv 2310.10094; code XYaoooo/DPT): P = A B, A [length, rank], B [rank, d].

P is put in front of the embedded tokens, after any scaling of the embeddings. The attention mask is extended by the
rows of P. The shape of outputs is unchanged: the rows of P are removed before heads and poolers run, so labels need no
change, and the loss covers only the predictions of tokens. If a sequence of a batch is padded on the left, P is put
after the padding, so the sequence has the same outputs as without padding. In encoder-decoder models P is in the
encoder's input, and the decoder attends to it.

Parameters: length * d; rank * (length + d) with a rank.

Start: P starts as embeddings of randomly drawn tokens (all different if the vocabulary is large enough) or of given
tokens, or uniform in +-0.5. A and B start uniform in +-0.5, so that both get gradients. No start is an identity: any
row in front changes the outputs.

Differs from the authors' code: The authors draw tokens from the first 5,000 of the vocabulary. Other implementations
also include the last row's prediction of the first token in the loss, and put P before the padding, further from the
tokens.

Use it: `peftcore.apply(model, "prompt_tuning")`, on large models, where it almost reaches full fine-tuning with a few
thousand parameters; the paper trains with a learning rate of 0.3. `rank` reduces the parameters of a long prompt; for a
short prompt it saves little.
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


class PromptTuningConfig(MethodConfig):
    """Options of prompt tuning."""

    method: Literal["prompt_tuning"] = "prompt_tuning"
    length: PositiveInt = 20
    """Number of rows of the prompt."""
    init: Literal["vocabulary", "uniform"] = "vocabulary"
    """The start of the prompt: embeddings of randomly drawn tokens, or uniform in +-0.5."""
    init_ids: list[NonNegativeInt] = Field(default_factory=list)
    """Token ids whose embeddings the prompt starts from instead, such as those of a text or of the class names. They
    are repeated or cut to the prompt's length."""
    behind_embeddings: bool = False
    """Insert the prompt after the whole embedding module, as in the adapters package. Its rows get neither positions
    nor the norm of embeddings, and tokens keep their positions. Only for encoders."""
    rank: PositiveInt | None = None
    """Make the prompt the product of two factors of this rank. This requires ``init="uniform"``, since the factors
    start uniform. None trains the prompt directly."""

    @model_validator(mode="after")
    def _factors_start_uniform(self) -> Self:
        if self.rank is not None and (self.init != "uniform" or self.init_ids):
            raise ValueError('rank= starts its factors uniform, not from tokens; set init="uniform", and no init_ids')
        return self


class PromptOperator(SequenceOperator):
    """The prompt of one encoder or decoder, or the factors of the prompt."""

    prompt: nn.Parameter

    def __init__(self, site: SequenceSite, config: PromptTuningConfig) -> None:
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
    Config = PromptTuningConfig
    tags = Tags(category="additive", paper="2104.08691", identity_at_init=False, per_row=False)
    learning_rate = LearningRate(
        0.3,
        "google-research/prompt-tuning@72285ee, prompt_tuning/configs/runs/prompt_finetune.gin",
        on="T5 1.1 of all sizes",
        optimizer="Adafactor",
    )
    target = "stack"

    def inject(self, model: nn.Module, config: PromptTuningConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.sequence(site, PromptOperator, config, behind=config.behind_embeddings)

    @staticmethod
    def parameter_count(site: Site, config: PromptTuningConfig) -> int:
        if config.rank is not None:
            return config.rank * (config.length + site.out_features)
        return config.length * site.out_features
