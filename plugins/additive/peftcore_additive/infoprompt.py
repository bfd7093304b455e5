"""InfoPrompt: a prompt that is to tell of the head, and of what the model makes of it.   Wu et al. 2023, arXiv
2306.04933 (code: JoshuaWu1997/infoprompt).

    X' = [P(x) ; X],   P(x) = W2 gelu(W1 u + b1) + b2,   u what the model itself makes of the text x
    L = L_model + w_h L_head + w_r L_rep + w_k KL

Prompts are made as in `idpg`: u [d] is the state of the text's first token in a first pass without the prompt, or of
its last one in causal models; no gradient goes there. The losses act in training; evaluation is the prompt alone.
Two of them are InfoNCE bounds on mutual information, -log(exp s_0 / (exp s_0 + sum_j exp s_j)); p is the mean of P(x):

    L_head:  s(p) = p c / sqrt(d)  against s(e_j),   e_j embedded tokens of the text, c the mean of the head's rows
    L_rep:   s(z) = (U z) (M p + m) / sqrt(d),   z = mean(v) + std(v) noise   against z of u

In L_rep, v is the state of u's token behind the prompt, drawn from once; negatives are as many draws as `draws` times
the batch from u, of the same text. v carries gradients, p does not. KL is how far both Gaussians are from N(0, 1); mean
and log std (within -2 and 10) are linear and h wide. They, U, M and m are the critics: they train along and are in the
file, for training that goes on, and are of no use later. The head is the model's own, and gets gradients where it
trains; a model with none as wide as its embedded tokens has no L_head. In training it scores the text's tokens too.

Of the paper the sum and the two bounds are known here; all else is the code's, whose author, a J. Wu of UC San Diego,
is plausibly the paper's first one. Otherwise than there: it scores classes from U z, a bottleneck before its head, and
here the head reads what it always does; u and v are its [CLS] and [MASK]; its rows stand around [MASK], where as it was
published it wants four times the rows that it makes, and takes those of the batch's first text; and each loss ends at
2, with no gradient above, which with 7 negatives or more is everywhere while it is at chance (`ceiling`).

Parameters: (d + 1) h + (h + 1) length d, and critics of 3 d h + 2 h + d^2 + d.

Use it where prompts learn slowly; not where a second pass counts (`prompt_tuning` has none).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
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
    Tap,
    forward_context,
    full_precision,
    head_sites,
)
from peftcore.errors import ConfigError
from peftcore_additive._first_pass import first_pass
from peftcore_additive._information import FeatureCritic, HeadLoss


class InfoPromptConfig(MethodConfig):
    """Options of InfoPrompt."""

    method: Literal["infoprompt"] = "infoprompt"
    length: PositiveInt = 1
    """Rows of the prompt."""
    hidden: PositiveInt = 32
    """Width h of the network that makes it, and of the features."""
    head_weight: NonNegativeFloat = 0.1
    """Weight w_h of the loss with the head."""
    representation_weight: NonNegativeFloat = 0.2
    """Weight w_r of the loss with the features; without it there are no features."""
    kl_weight: NonNegativeFloat = 0.1
    """Weight w_k of the features' divergence from N(0, 1)."""
    draws: PositiveInt = 4
    """Negatives of each text in L_rep, times the texts of the batch."""
    ceiling: PositiveFloat | None = None
    """The most that a text adds to either bound's loss; above it there are no gradients. The authors' code has 2."""
    outputs: list[NonNegativeInt] = Field(default_factory=list)
    """The head's rows of which c is the mean: the tokens that name classes, for a language model. All without."""


class InfoPromptOperator(InstanceOperator):
    """The network that makes the prompt of one stack, and the critic of its features."""

    def __init__(self, site: SequenceSite, config: InfoPromptConfig, told: Tap) -> None:
        super().__init__(site, config.length)
        self.down = nn.Linear(self.width, config.hidden)
        self.up = nn.Linear(config.hidden, config.length * self.width)
        self.weight, self.kl, self.ceiling = config.representation_weight, config.kl_weight, config.ceiling
        self.critic = FeatureCritic(self.width, config.hidden, config.draws) if self.weight else None
        self.summary, self.mean, self.told = Tap(), Tap(), told

    def look(self, call: Callable[..., Any], given: Mapping[str, Any], text: Tensor) -> None:
        self.summary.put(first_pass(self, call, given, text))

    def rows_of(self, embeds: Tensor, text: Tensor) -> Tensor:
        with full_precision(embeds):
            hidden = self.down(self.summary.get().state.to(self.down.weight.dtype))
            made: Tensor = self.up(nn.functional.gelu(hidden)).unflatten(-1, (self.length, self.width))
        if self.training:
            self.mean.put(made.mean(1))
            self.told.put((made.mean(1), embeds, text))
        return made

    def learn(self, states: Tensor, text: Tensor) -> None:
        if self.critic is None:
            return
        without, prompt = self.summary.take(), self.mean.take()
        with full_precision(states):
            pair = [each.to(prompt.dtype) for each in (without.state, without.same(states))]
            loss, divergence = self.critic(*pair, prompt, self.ceiling)
            forward_context().add_loss(self.weight * loss + self.kl * divergence, self)


class InfoPrompt(Method):
    """A prompt for each text, with losses that have it tell of the head and of the model's features."""

    name = "infoprompt"
    Config = InfoPromptConfig
    tags = Tags(category="additive", paper="2306.04933", identity_at_init=False, per_row=False)
    learning_rate = LearningRate(1e-3, "JoshuaWu1997/infoprompt@cc56fba, trainers/options.py", on="RoBERTa-large, GLUE")
    target = "stack"

    def inject(self, model: nn.Module, config: InfoPromptConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            stack, own, told = surgeon.sequence_site(site), config.at(site.path), Tap()
            surgeon.sequence(site, InfoPromptOperator, config, told=told)
            heads = [head for head in head_sites(surgeon) if head.in_features == stack.out_features]
            if not own.head_weight or not heads:
                continue
            head = max(heads, key=lambda each: each.out_features)
            if unknown := [each for each in own.outputs if each >= head.out_features]:
                raise ConfigError(f"outputs: {unknown[:4]} are none of the {head.out_features} of {head.path}")
            options = told, own.head_weight, own.outputs, own.ceiling
            surgeon.graft(head, lambda at, options=options: HeadLoss(at, *options))

    @staticmethod
    def parameter_count(site: Site, config: InfoPromptConfig) -> int:
        if not isinstance(site, SequenceSite):
            return 0  # the head
        d, h = site.out_features, config.hidden
        critics = 3 * d * h + 2 * h + d * (d + 1) if config.representation_weight else 0
        return (d + 1) * h + (h + 1) * config.length * d + critics
