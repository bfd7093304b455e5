"""SMoP: a sparse mixture of short prompts.   Choi et al. 2023, EMNLP, aclanthology.org/2023.emnlp-main.884.

Equation:
    X' = [p_j P_j ; X],   p = softmax(W m),   m = mean of the text's rows of X,   j = argmax p

X are the embedded tokens. There are E short prompts P_j [length, d]. Each text gets the prompt with the highest
probability, multiplied by this probability; this factor gives the router W [E, d] its gradient. In training `noise` * e
* W m is added to W m, where e is standard normal; this term has zero gradient. The noise also distributes texts over
prompts, since there is no loss for that. With `top_k` the prompt is the sum of several p_j P_j.

The text is all tokens before the first label, or the whole input without labels; ``peftcore.call(model,
prompt_length=...)`` sets its length instead. The prompt is chosen once, so generated tokens do not change it.

Parameters: E (length + 1) d.

Start: W starts orthogonal, P_j from a standard normal distribution. No start is an identity.

Differs from the authors' code: The authors' code (jyjohnchoi/SMoP) adds up the chosen prompts of all texts of a batch,
by a broadcast. The paper does not describe this sum, and for a single text it does not occur. Here each text gets only
its own prompt. The code computes a factor for load balancing, but does not use it.

Use it: `peftcore.apply(model, "smop")`, where a task has several kinds of text, for which one prompt would have to be
long. If all texts are similar, use `prompt_tuning`; if each text needs another prompt, use `idpg`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
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


class SMoPConfig(MethodConfig):
    """Options of SMoP."""

    method: Literal["smop"] = "smop"
    prompts: PositiveInt = 4
    """Number E of short prompts."""
    length: PositiveInt = 5
    """Number of rows of each prompt."""
    top_k: PositiveInt = 1
    """Number of prompts that are added up for a text."""
    noise: Annotated[float, Field(ge=0.0)] = 1.0
    """Standard deviation of the relative noise on the router's scores in training."""

    @model_validator(mode="after")
    def _enough_prompts(self) -> Self:
        if self.top_k > self.prompts:
            raise ValueError(f"top_k={self.top_k} is larger than prompts={self.prompts}")
        return self


class SMoPOperator(InstanceOperator):
    """The short prompts of one encoder or decoder, and their router."""

    def __init__(self, site: SequenceSite, config: SMoPConfig) -> None:
        super().__init__(site, config.length)
        self.top_k, self.noise = config.top_k, config.noise
        self.prompts = nn.Parameter(torch.randn(config.prompts, config.length, self.width))
        self.router = nn.Parameter(nn.init.orthogonal_(torch.empty(config.prompts, self.width)))

    def probabilities(self, embeds: Tensor, text: Tensor) -> Tensor:
        """Return the router's probability of each prompt for each text, ``[batch, prompts]``."""
        of_text = text[..., None].to(self.router.dtype)
        mean = (embeds.to(self.router.dtype) * of_text).sum(1) / of_text.sum(1).clamp(min=1)
        scores = mean @ self.router.T
        if self.training and self.noise:
            scores = scores + self.noise * torch.randn_like(scores) * scores.detach()
        return scores.softmax(-1)

    def rows_of(self, embeds: Tensor, text: Tensor) -> Tensor:
        with full_precision(embeds):
            values, chosen = self.probabilities(embeds, text).topk(self.top_k)  # [batch, top_k]
            return (values[..., None, None] * self.prompts[chosen]).sum(1)


class SMoP(Method):
    """A short prompt for each text, chosen among several by a router."""

    name = "smop"
    Config = SMoPConfig
    tags = Tags(
        category="additive",
        paper="aclanthology.org/2023.emnlp-main.884",
        identity_at_init=False,
        per_row=False,
        random=True,
        exact_gradient=False,
    )
    learning_rate = LearningRate(0.5, "jyjohnchoi/SMoP@34da5e2, README.md", on="T5-base, RTE", optimizer="Adafactor")
    target = "stack"

    def inject(self, model: nn.Module, config: SMoPConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.sequence(site, SMoPOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: SMoPConfig) -> int:
        return config.prompts * (config.length + 1) * site.out_features
