"""CPT: context-aware prompt tuning.   Blau et al. 2024, arXiv 2410.17222 (in peft, by its authors).

Equation:
    X' = [E(c) + D ; E(ids)],   c the tokens of some solved examples,   |D_i| <= epsilon_i sqrt(d / 2048)

The prompt starts as the embeddings of solved examples in front of the question, and changes little: after each step
every row of D is projected back into a ball of radius epsilon_i. `types` contains the type of each token. In the first
example 1 is text before the input, 2 is the input, 3 is text before the answer, and 4 is the answer. Types increase by
4 from example to example, so the second example has 5 to 8. 0 is unused. Rows of inputs have the radius `epsilon`, rows
of text before inputs and answers have the radius `format_epsilon`, and rows of answers do not change.

The loss covers the labels and the answers in the prompt, which the model predicts from the tokens before them:

    L = sum_t w_t CE_t / number of t,   t: labels (w = 1), and answers (w = decay^n, n = 1 for the last example)

L replaces the model's own loss if labels are passed and the model is in training mode. Labels of the question and of
padding have to be -100. The first label counts too: the prompt's last row predicts it. In a batch with left padding the
prompt is inserted after the padding.

Gradients ignore the projection, as in peft. A file of peft stores the sum E(c) + D, so after loading, here and in peft,
the ball is centered at this sum.

Parameters: length * d, including the rows of answers, as in peft.

Start: D is zero. The examples in the prompt change the outputs, so no start is an identity.

Differs from the authors' code: The authors' code is the one in peft, and three points differ from it. In peft the next
forward projects a row and overwrites the parameter; here `injection.optimizer` does that after each step. With other
optimizers the forward uses the projected rows, and D itself may leave the ball. In peft, left padding of a batch is
between prompt and text, so the last token of padding predicts the first label; here the prompt is after the padding.
peft marks labels of the question in `input_type_mask`; here they are -100.

Use it: `peftcore.apply(model, "cpt", ids=[5, 6, 7, 8], types=[1, 2, 3, 4])`, for tasks with few training examples,
where other methods overfit and solved examples in the context help.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    ForwardContext,
    GradientRule,
    LearningRate,
    Method,
    MethodConfig,
    Rows,
    SequenceOperator,
    SequenceSite,
    Site,
    Surgeon,
    Tags,
    Tap,
    row_logits,
)
from peftcore.errors import ConfigError


class CPTConfig(MethodConfig):
    """Options of CPT."""

    method: Literal["cpt"] = "cpt"
    ids: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """The token ids of the examples."""
    types: list[NonNegativeInt] = Field(default_factory=list)
    """The type of each token: 1 text before the input, 2 input, 3 text before the answer, 4 answer, with 4 added for
    each further example. By default all tokens have the type 1."""
    epsilon: NonNegativeFloat = 0.1
    """Largest norm of the change of a prompt row that belongs to an input, in a model of width 2048."""
    format_epsilon: NonNegativeFloat = 0.1
    """Largest norm of the change of a prompt row that belongs to text before inputs or answers, in a model of width
    2048."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Loss weight of an example's answer, divided by that of the next example's answer; with 1 all answers have equal
    weights."""

    @model_validator(mode="after")
    def _one_type_each(self) -> CPTConfig:
        if self.types and len(self.types) != len(self.ids):
            raise ValueError(
                f"types= has {len(self.types)} entries, but ids= has {len(self.ids)}; pass one type for each id"
            )
        return self

    def kinds(self) -> list[int]:
        """Return the type of each token; without `types`, 1 for all."""
        return self.types or [1] * len(self.ids)

    def answers(self) -> dict[int, float]:
        """Return the loss weight of each answer token, by the token's position in the prompt. The first token of the
        prompt is left out, since no token precedes it."""
        kinds = dict(enumerate(self.kinds()))
        places = [place for place, kind in kinds.items() if kind > 0 and kind % 4 == 0 and place > 0]
        examples = sorted({kinds[place] for place in places}, reverse=True)
        return {place: self.decay ** (1 + examples.index(kinds[place])) for place in places}


IGNORED = -100
"""The label that the loss ignores."""


def more_than_labels(answers: Collection[tuple[int, float]], made: Rows, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of labels and answers, in float32 or more, minus the mean cross-entropy of the
    labels alone, which is the model's own loss.

    Args:
        answers: the answer tokens in the prompt, each with the weight of its loss; each counts as one label in the
            mean.
        made: the logits at the rows that predict the answers, and at the last row, which predicts the first label.
        logits: the model's logits, ``[batch, tokens, vocabulary]``.
        labels: ``[batch, tokens]`` int64.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    logits, scored, labels = logits.to(precise), made.states.to(precise), labels.to(logits.device)
    first = labels.new_zeros(len(labels)) if made.behind is None else made.behind.to(labels)
    first = first[:, None].clamp(max=labels.shape[1] - 1)
    before = logits[:, :-1].flatten(0, 1)  # of what stands before each label but the first
    own = F.cross_entropy(before, labels[:, 1:].flatten(), ignore_index=IGNORED)
    rest = labels.scatter(1, first, IGNORED)[:, 1:].flatten()
    told = labels.new_tensor([token for token, _ in answers]).expand(len(labels), -1)
    told = torch.cat([told, labels.gather(1, first)], 1)
    weights = scored.new_tensor([*(weight for _, weight in answers), 1.0])
    losses = F.cross_entropy(scored.flatten(0, 1), told.flatten(), ignore_index=IGNORED, reduction="none")
    total = F.cross_entropy(before, rest, ignore_index=IGNORED, reduction="sum")
    total = total + (losses.view(told.shape) * weights).sum()
    mean: Tensor = total / (rest.ne(IGNORED).sum() + told.ne(IGNORED).sum()) - own
    return mean


class CPTOperator(SequenceOperator):
    """The prompt of one encoder or decoder."""

    start: Tensor
    logits: Tap

    def __init__(self, site: SequenceSite, config: CPTConfig) -> None:
        if unknown := [each for each in config.ids if each >= site.in_features]:
            raise ConfigError(f"ids= has ids outside of the vocabulary of {site.in_features} tokens: {unknown[:4]}")
        super().__init__(site, len(config.ids))
        part = [0.0, config.format_epsilon, config.epsilon, config.format_epsilon]
        self.bounds = [part[kind % 4] * (self.width / 2048) ** 0.5 for kind in config.kinds()]
        self.register_buffer("start", site.embedded(torch.tensor(config.ids)).to(torch.float32, copy=True))
        self.delta = nn.Parameter(torch.zeros(self.length, self.width))
        self.answers = {place: (config.ids[place], weight) for place, weight in config.answers().items()}

    @property
    def limits(self) -> Tensor:
        """The largest allowed norm of each row's change, ``[length, 1]``."""
        return self.delta.new_tensor(self.bounds)[:, None]

    def within(self, delta: Tensor) -> Tensor:
        """Return the change of the prompt's rows ``[length, width]``, with each row projected into its ball of allowed
        changes."""
        limits, tiny = self.limits, torch.finfo(delta.dtype).tiny
        return delta * (limits / delta.norm(dim=-1, keepdim=True).maximum(limits).clamp(min=tiny))

    def rows(self, embeds: Tensor) -> Tensor:
        moved = self.delta + (self.within(self.delta) - self.delta).detach()
        return self.start + moved * (self.limits > 0)


class Within(GradientRule):
    """Limits the changes of a prompt's rows: after each optimizer step, each row's change is projected back into its
    ball."""

    def __init__(self, operators: dict[nn.Parameter, CPTOperator]) -> None:
        super().__init__()
        self.operators = operators

    def project(self, grad: Tensor, param: nn.Parameter) -> Tensor:
        return grad.clone() if param in self.operators else grad

    def restore(self, update: Tensor, param: nn.Parameter) -> Tensor:
        return self.operators[param].within(param + update) - param


class CPT(Method):
    """A prompt that starts as solved examples and changes little; its loss includes the examples' answers.

    Example:
        injection = peftcore.apply(model, "cpt", ids=[5, 6, 7, 8], types=[1, 2, 3, 4])
    """

    name = "cpt"
    Config = CPTConfig
    tags = Tags(category="additive", paper="2410.17222", identity_at_init=False, per_row=False, exact_gradient=False)
    learning_rate = LearningRate(
        1e-4,
        "huggingface/peft@5d602fd, examples/cpt_finetuning/cpt_train_and_inference.ipynb",
        on="BLOOM 1.7B, SST-2",
    )
    target = "stack"

    def inject(self, model: nn.Module, config: CPTConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            stack, own = surgeon.sequence_site(site), config.at(site.path)
            operator = surgeon.sequence(site, CPTOperator, config)
            scored = [place - 1 for place in own.answers()] + [len(own.ids) - 1]
            operator.logits = row_logits(surgeon, stack, operator, scored)

    def output_loss(self, injection: AppliedMethod, output: Any, call: ForwardContext) -> Tensor | None:
        labels = call.inputs.get("labels")
        if not isinstance(labels, Tensor):
            return None
        logits = output["logits"] if isinstance(output, Mapping) else output[1]
        operators = [each for each in injection.operators.values() if isinstance(each, CPTOperator)]
        made = [(each.answers.values(), rows) for each in operators if (rows := each.logits.take()) is not None]
        return more_than_labels(*made[0], logits, labels) if made else None  # there is one stack with such a head

    def gradient_rule(self, injection: AppliedMethod) -> GradientRule:
        operators = [each for each in injection.operators.values() if isinstance(each, CPTOperator)]
        return Within({each.delta: each for each in operators})

    @staticmethod
    def parameter_count(site: Site, config: CPTConfig) -> int:
        return len(config.ids) * site.out_features if isinstance(site, SequenceSite) else 0
