"""Prompt tuning.   Lester et al. 2021, arXiv 2104.08691.

    X' = [P ; E(ids)],   P [length, d]

P stands in front of the embedded tokens, behind any scaling of the embeddings, and sees what tokens there would see.
Outputs have the shape they have without it: its rows are dropped before anything scores or pools, so labels need no
change, and the loss counts what the tokens predict. (Other implementations also count how the last row of P predicts
the first token.) Where a sequence of a batch is padded on the left, P stands behind the padding, and the sequence gives
what it gives alone. (Others put P before it, further from the tokens.) In encoder-decoder models P stands in the
encoder, and the decoder attends to it.

Never identity at the start: anything in front moves the outputs. P starts as embeddings of tokens drawn from the
vocabulary, of given tokens, or uniform in +-0.5. Parameters: length * d.

Use it on large models, where it comes close to full fine-tuning with a few thousand numbers; the paper trains with a
learning rate of 0.3.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from peftcore import LearningRate, Method, MethodConfig, SequenceOperator, SequenceSite, Site, Surgeon, Tags
from peftcore.errors import ConfigError


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


class PromptOperator(SequenceOperator):
    """The prompt of one stack."""

    def __init__(self, site: SequenceSite, config: Config) -> None:
        super().__init__(site, config.length)
        if config.init == "vocabulary" or config.init_ids:
            start = site.embedded(_ids(site.in_features, config))
        else:
            start = torch.rand(config.length, self.width) - 0.5
        self.prompt = nn.Parameter(start.to(torch.float32, copy=True))

    def rows(self, embeds: Tensor) -> Tensor:
        return self.prompt


def _ids(vocabulary: int, config: Config) -> Tensor:
    """Return the tokens whose embeddings the prompt starts from."""
    if not config.init_ids:
        return torch.randint(vocabulary, (config.length,))
    unknown = [each for each in config.init_ids if each >= vocabulary]
    if unknown:
        raise ConfigError(f"init_ids: {unknown[:4]} are no tokens of a vocabulary of {vocabulary}")
    return torch.tensor(config.init_ids).repeat(-(-config.length // len(config.init_ids)))[: config.length]


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
        return config.length * site.out_features
