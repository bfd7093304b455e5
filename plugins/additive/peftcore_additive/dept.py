"""DePT: decomposed prompt tuning.   Shi and Lipani 2023, arXiv 2309.05173.

Equation:
    X' = [P ; X + alpha / sqrt(r) (A B)[:n]],   P [m, d], A [s, r], B [r, d]

X are the n embedded tokens of the text. Row t of A B is added to token t; tokens after the first s do not change. So a
prompt of m rows with this update can replace a longer prompt with as many parameters, and takes less time. The text is
all tokens before the first label, or the whole input without labels; ``peftcore.call(model, prompt_length=...)`` sets
its length instead. Tokens of answers do not change. Rows of A B are counted from the first token that is not padding.

The authors find that P needs another learning rate than A and B. Pass the rate of P to ``injection.optimizer``; A and B
get `update_ratio` times this rate. Parameters: m d + r (s + d).

Start: P starts as embeddings of randomly drawn or given tokens; A as torch's linear layers do, B at zero. No start is
an identity.

Differs from the authors' code: Here rows of A B are counted from the first token that is not padding, and are not added
to answers. The authors pad inputs to s. Their causal models are padded on the left, so rows are in effect counted from
the end. In training they are added to answers, but in generation not to generated tokens.

Use it: `peftcore.apply(model, "dept")`, where long prompts take too much time. For texts much longer than s use
`prompt_tuning`, since tokens after the first s do not change.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    InstanceOperator,
    LearningRate,
    Method,
    MethodConfig,
    SequenceSite,
    Site,
    Surgeon,
    Tags,
    full_precision,
)
from peftcore_additive._rows import embedded_tokens


class DePTConfig(MethodConfig):
    """Options of DePT."""

    method: Literal["dept"] = "dept"
    length: PositiveInt = 40
    """Number m of rows of the short prompt."""
    rank: PositiveInt = 45
    """Rank r of the update of the embeddings."""
    max_length: PositiveInt = 256
    """Number s of tokens, from the start of a text, that are updated."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / sqrt(rank)`` of the update of the embeddings."""
    init_ids: list[NonNegativeInt] = Field(default_factory=list)
    """Token ids whose embeddings the prompt starts from, repeated or cut to its length. By default randomly drawn
    tokens are used."""
    update_ratio: PositiveFloat = 5e-4 / 0.3
    """Learning rate of A and B, divided by that of the prompt."""


class DePTOperator(InstanceOperator):
    """The short prompt of one encoder or decoder, and the low-rank update of its embedded tokens."""

    def __init__(self, site: SequenceSite, config: DePTConfig) -> None:
        super().__init__(site, config.length)
        self.scale = config.alpha / math.sqrt(config.rank)
        self.prompt = nn.Parameter(embedded_tokens(site, config.length, config.init_ids))
        bound = 1 / math.sqrt(config.rank)
        self.A = nn.Parameter(torch.empty(config.max_length, config.rank).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(config.rank, self.width))

    def rows_of(self, embeds: Tensor, text: Tensor) -> Tensor:
        return self.prompt

    def tokens(self, embeds: Tensor, text: Tensor) -> Tensor:
        place = text.cumsum(-1) - 1  # [batch, tokens], which row of A is a token's
        adapted = (text & (place < len(self.A)))[..., None]
        with full_precision(embeds):
            update = self.scale * (self.A @ self.B)
        (update,) = self.cast(embeds, update)
        return embeds + torch.where(adapted, update[place.clamp(0, len(self.A) - 1)], 0)


class DePT(Method):
    """A short prompt, and a low-rank addition to the embedded tokens."""

    name = "dept"
    Config = DePTConfig
    tags = Tags(category="additive", paper="2309.05173", identity_at_init=False, per_row=False)
    learning_rate = LearningRate(0.3, "ZhengxiangShi/DePT@f0266a7, README.md", on="T5-base, GLUE")
    target = "stack"

    def inject(self, model: nn.Module, config: DePTConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.sequence(site, DePTOperator, config)

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        operators = [each for each in injection.operators.values() if isinstance(each, DePTOperator)]
        factors = {id(factor) for each in operators for factor in (each.A, each.B)}
        trained = [p for p in injection.parameters() if p.requires_grad]
        prompts = {"params": [p for p in trained if id(p) not in factors], **defaults, "lr": lr}
        updates = {"params": [p for p in trained if id(p) in factors], **defaults}
        return [prompts, {**updates, "lr": lr * injection.config.update_ratio}]

    @staticmethod
    def parameter_count(site: Site, config: DePTConfig) -> int:
        return config.length * site.out_features + config.rank * (config.max_length + site.out_features)
