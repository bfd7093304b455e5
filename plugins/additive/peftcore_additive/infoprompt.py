"""InfoPrompt: a generated prompt that has high mutual information with the head and with the model's features.   Wu et
al. 2023, arXiv 2306.04933 (code: JoshuaWu1997/infoprompt).

Equation:
    X' = [P(x) ; X],   P(x) = W2 gelu(W1 u + b1) + b2,   u what the model itself makes of the text x
    L = L_model + w_h L_head + w_r L_rep + w_k KL

Prompts are generated as in `idpg`: u [d] is the detached state of the text's first token in a first pass without the
prompt. In causal models it is the state of the last token. The losses act only in training. L_head and L_rep are
InfoNCE bounds on mutual information, -log(exp s_0 / (exp s_0 + sum_j exp s_j)); p is the mean of P(x):

    L_head:  s(p) = p c / sqrt(d)  against s(e_j),   e_j embedded tokens of the text, c the mean of the head's rows
    L_rep:   s(z) = (U z) (M p + m) / sqrt(d),   z = mean(v) + std(v) noise   against z of u

In L_rep, v is the state of the same token as u, in the pass with the prompt. z is drawn from a Gaussian whose mean and
log std (limited to -2 .. 10), of width h, are linear maps of a state. The positive is one z drawn with the state v. The
negatives are `draws` * batch z drawn with the state u of the same text. v carries gradients, p does not. KL is the
divergence of both Gaussians from N(0, 1).

The two linear maps, U, M and m are the critics. They train too, and are saved so that training can resume; after
training they are not used. The head is the model's own, and gets gradients if it trains. In training the head also
scores the text's tokens. If no head is as wide as the embedded tokens, L_head is left out.

Parameters: (d + 1) h + (h + 1) length d, and critics of 3 d h + 2 h + d^2 + d.

Start: The network and the critics start as torch's linear layers; no start is an identity.

Differs from the authors' code: From the paper only the sum of losses and the two bounds were available; everything else
follows the code, whose author, a J. Wu of UC San Diego, is probably the paper's first author. The code predicts classes
from U z, a bottleneck before its head; here the head's input is unchanged. The code's u and v are the states of [CLS]
and [MASK]. It inserts the rows around [MASK], but needs four times as many rows as it generates, and uses the rows of
the batch's first text for all texts. It clamps each loss at 2, without a gradient above; with 7 or more negatives this
clamps every text while scores are at chance (`ceiling`).

Use it: `peftcore.apply(model, "infoprompt")`, where prompts learn slowly. If a second pass takes too much time, use
`prompt_tuning`, which needs only one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    InstanceOperator,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
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


class InfoPromptConfig(MethodConfig):
    """Options of InfoPrompt."""

    method: Literal["infoprompt"] = "infoprompt"
    length: PositiveInt = 1
    """Number of rows of the prompt."""
    hidden: PositiveInt = 32
    """Width h of the network that generates the prompt, and of the features z."""
    head_weight: NonNegativeFloat = 0.1
    """Weight w_h of L_head."""
    representation_weight: NonNegativeFloat = 0.2
    """Weight w_r of L_rep; 0 leaves the features out."""
    kl_weight: NonNegativeFloat = 0.1
    """Weight w_k of KL, the features' divergence from N(0, 1)."""
    draws: PositiveInt = 4
    """Number of negatives in L_rep for each text, divided by the number of texts in the batch."""
    ceiling: PositiveFloat | None = None
    """The largest loss of a text for both bounds; larger losses are clamped and have no gradient. The authors' code
    uses 2."""
    outputs: list[NonNegativeInt] = Field(default_factory=list)
    """Indices of the head's rows that L_head averages. For a language model, pass the tokens that name classes. By
    default all rows are used."""


HIDDEN = -100.0
"""A large negative number, which is added to the scores of padding."""


def info_nce(positive: Tensor, negatives: Tensor, ceiling: float | None) -> Tensor:
    """Return the mean over a batch of ``-log softmax`` at the positive, of shape ``[]``.

    Args:
        positive: the score of the positive, ``[batch, 1]``.
        negatives: the scores of the negatives, ``[batch, k]``.
        ceiling: the largest loss of a text; a larger loss is clamped and has no gradient.
    """
    scores = torch.cat([positive, negatives], -1)
    loss = -scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)[:, 0]
    return (loss if ceiling is None else loss.clamp(max=ceiling)).mean()


class FeatureCritic(nn.Module):
    """The critic of L_rep: it scores a text's features, drawn from Gaussians, against the text's prompt."""

    def __init__(self, width: int, hidden: int, draws: int) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.up, self.of_prompt = nn.Linear(hidden, width, bias=False), nn.Linear(width, width)
        self.draws = draws

    def forward(self, without: Tensor, within: Tensor, prompt: Tensor, ceiling: float | None) -> tuple[Tensor, Tensor]:
        """Return the loss of the bound, and the divergence of the Gaussians from N(0, 1); both have the shape ``[]``.

        Args:
            without: the state of each text without the prompt ``[batch, width]``, from which negatives are drawn.
            within: the states of the same tokens in the pass with the prompt, from which positives are drawn.
            prompt: the mean of the prompt's rows ``[batch, width]``, which is detached.
            ceiling: as in `info_nce`.
        """
        batch, width = within.shape
        asked = self.of_prompt(prompt.detach()) @ self.up.weight / width**0.5  # [batch, hidden]
        scores: list[Tensor] = []
        divergence = within.new_zeros(())
        for state, count in ((within, 1), (without, self.draws * batch)):
            mean, log_std = self.mean(state), self.log_std(state).clamp(-2.0, 10.0)
            noise = torch.randn(batch, count, mean.shape[-1], dtype=mean.dtype, device=mean.device)
            features = mean[:, None] + noise * log_std.exp()[:, None]  # [batch, count, hidden]
            scores.append((features @ asked[..., None]).squeeze(-1))
            divergence = divergence + (mean.square() + (2 * log_std).exp() - 1).mean() / 2 - log_std.mean()
        positive, negatives = scores
        return info_nce(positive, negatives, ceiling), divergence


class HeadLoss(Operator):
    """Wraps the head and adds L_head in training: the InfoNCE loss of the prompt's score against the scores of the
    text's embedded tokens."""

    def __init__(self, site: Site, told: Tap, weight: float, outputs: Sequence[int], ceiling: float | None) -> None:
        super().__init__(site)
        self.told, self.weight, self.outputs, self.ceiling = told, weight, list(outputs), ceiling

    def forward(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        told = self.told.take()
        if told is not None:
            with forward_context().aside():
                scores = self.scores(call, [told[0].to(x), told[1].to(x), told[2]], self.outputs)
            forward_context().add_loss(self.weight * info_nce(*scores, self.ceiling), self)
        return call(x, *args, **kwargs)

    @staticmethod
    def scores(call: Callable[..., Tensor], told: Sequence[Tensor], outputs: list[int]) -> tuple[Tensor, Tensor]:
        """Return the scores of the prompt ``[batch, 1]`` and of the tokens ``[batch, tokens]``.

        Args:
            call: the head's forward.
            told: the mean of the prompt's rows ``[batch, width]``, the embedded tokens ``[batch, tokens, width]``, and
                a mask of the tokens that belong to the text ``[batch, tokens]``.
            outputs: indices of the head's outputs whose mean is the score; all outputs if empty.
        """
        prompt, embeds, text = told
        logits = call(torch.cat([prompt[:, None], embeds], 1))
        logits = logits[..., outputs] if outputs else logits
        scores = logits.mean(-1) / prompt.shape[-1] ** 0.5  # biases move all of them alike
        return scores[:, :1], scores[:, 1:] + HIDDEN * ~text.to(scores.device)


class InfoPromptOperator(InstanceOperator):
    """The network that generates the prompt of one encoder or decoder, and the critic of its features."""

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
    """Generates a prompt for each text, with losses that maximize the prompt's mutual information with the head and
    with the model's features."""

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
                raise ConfigError(
                    f"outputs= has indices outside of the {head.out_features} outputs of {head.path}: {unknown[:4]}"
                )
            options: dict[str, Any] = {"weight": own.head_weight, "outputs": own.outputs, "ceiling": own.ceiling}
            surgeon.graft(head, HeadLoss, told=told, **options)

    @staticmethod
    def parameter_count(site: Site, config: InfoPromptConfig) -> int:
        if not isinstance(site, SequenceSite):
            return 0  # the head
        d, h = site.out_features, config.hidden
        critics = 3 * d * h + 2 * h + d * (d + 1) if config.representation_weight else 0
        return (d + 1) * h + (h + 1) * config.length * d + critics
