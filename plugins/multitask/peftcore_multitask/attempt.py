"""ATTEMPT: prompts of other tasks, mixed for each text.   Asai et al. 2022, arXiv 2205.11961 (code: AkariAsai/ATTEMPT).

Equation:
    X' = [P ; X],   P = P_t + sum_j a_j P_j,   a = softmax_j(max(P_j) . h / T),   h = LN(W_up silu(W_down max(X)))

X are the embedded tokens. P_1, P_2, ... [length, d] are the *sources*, prompts that were trained for other tasks and
are frozen. P_t is the task's own prompt, and also the last of the mixed prompts. The function max is the maximum of
each feature over the rows of a prompt, or over the tokens of the text. W_down [hidden, d], W_up [d, hidden] and the
norm LN are shared by all tasks. T is e times the width d (2087 in the authors' T5-base), unless `temperature` sets it.
`weights` multiply the sources. The call passes the task by ``with peftcore.call(model, task=...)``: one task for all
rows, or one for each row.

    peftcore.gather(model, "attempt", {"prompts/mnli": 1.0, "prompts/squad": 1.0}).trainable()

creates the adapter from prompts in files. Otherwise the sources start as prompts of `prompt_tuning` do. They are frozen
unless `train_parts` is True.

The text is the part of the input before the first label, or the whole input without labels, unless
``peftcore.call(model, prompt_length=...)`` passes its length. The mixture is computed once from the text; generated
tokens do not change it.

Parameters: length * d for each source and each task, and 2 hidden d, with `train_norm` + 2 d.

Start: P_t is the first source, for every task; W_down and W_up uniform in +-1/sqrt(inputs). No start is an identity.

Differs from the authors' code: The authors' max includes padding; here it does not. Their option of a trained
temperature does not work in their code; it is left out here, as are their other kinds of attention. LN has neither gain
nor bias. In the authors' code they are frozen at one and zero, although the 232,000 parameters that the paper counts
for T5-base include them (`train_norm`).

Use it: `peftcore.apply(model, "attempt", tasks=["sums", "letters"])`, where prompts of large tasks exist and a new
task has few examples; not to train many tasks at once from nothing (multitask_prompt_tuning), nor where a prompt need
not depend on the text (spot starts from one source).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    InstanceOperator,
    LearningRate,
    Method,
    Router,
    SequenceSite,
    Site,
    Surgeon,
    Tags,
    full_precision,
    options_of,
)
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore_additive import prompt_tuning
from peftcore_multitask._merging import MOST, Members, OfMergedParts, PartsConfig, collected
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count

SOURCE = {"method": "prompt_tuning", "length": 100}


class AttemptConfig(TaskConfig, PartsConfig):
    """Options of ATTEMPT."""

    method: Literal["attempt"] = "attempt"
    changes_weights: ClassVar[bool] = False
    parts: list[dict[str, Any]] = Field(
        default_factory=lambda: [{**SOURCE} for _ in range(6)], min_length=1, max_length=MOST
    )
    """The sources: prompts of one length. Each entry has the options of one prompt, with "prompt_tuning" under
    "method"."""
    train_parts: bool = False
    """Train the sources too."""
    train_norm: bool = False
    """Give the norm after the network a trained gain and bias."""
    hidden: PositiveInt = 100
    """Hidden width of the network that computes the attention to the sources."""
    temperature: PositiveFloat | None = None
    """Divides the logits of the softmax; None is e times the width."""

    @model_validator(mode="after")
    def _prompts(self) -> Self:
        for part in self.parts:
            if not isinstance(options_of(part), prompt_tuning.PromptTuningConfig):
                raise ConfigError(f"{part['method']!r} cannot be a part of attempt: use prompt_tuning parts")
        if len(lengths := {length_of(part) for part in self.parts}) > 1:
            raise ConfigError(f"sources of lengths {sorted(lengths)} cannot be added; use sources of one length")
        return self


def length_of(part: dict[str, Any]) -> int:
    """Return how many rows a source has."""
    options: Any = options_of(part)
    return int(options.length)


class AttemptOperator(InstanceOperator, Router):
    """The sources of one stack, the prompts of its tasks, and the attention that mixes them."""

    routes = "sequence"

    def __init__(self, site: SequenceSite, config: AttemptConfig, members: Members) -> None:
        super().__init__(site, length_of(config.parts[0]))
        self.parts = nn.ModuleDict({str(index): graft.operator for index, graft in members.items()})
        weights = config.weights or [1.0] * len(config.parts)
        self.weights = [weights[index] for index in members]
        self.tasks = Tasks(site, config)
        self.temperature = config.temperature or math.e * self.width
        self.prompt = nn.Parameter(torch.empty(task_count(config), self.length, self.width))
        self.start()
        self.down = nn.Linear(self.width, config.hidden, bias=False)
        self.up = nn.Linear(config.hidden, self.width, bias=False)
        self.norm = nn.LayerNorm(self.width, elementwise_affine=config.train_norm)

    @torch.no_grad()
    def start(self) -> None:
        """Set the prompt of each task to the first source."""
        first: Any = next(iter(self.parts.values()))
        self.prompt.copy_(first.rows(self.prompt))

    def rows_of(self, embeds: Tensor, text: Tensor) -> Tensor:
        with full_precision(embeds):
            sources: list[Tensor] = [
                weight * part.rows(embeds)  # type: ignore[operator]
                for weight, part in zip(self.weights, self.parts.values(), strict=True)
            ]
            target = self.tasks.of_rows(self.prompt, len(embeds)).expand(len(embeds), -1, -1)
            mixed = torch.stack([*(each.expand_as(target) for each in sources), target], 1)  # [batch, mixed, length, d]
            shares = self.shares(embeds, text, mixed)
            self.noted(shares)
            return target + torch.einsum("bj,bjld->bld", shares, mixed)

    def shares(self, embeds: Tensor, text: Tensor, mixed: Tensor) -> Tensor:
        """Return the attention weight of each prompt for each text, ``[batch, mixed]``."""
        largest = embeds.to(mixed.dtype).masked_fill(~text[..., None], -torch.inf).amax(1)
        largest = largest.masked_fill(~text.any(1, keepdim=True), 0.0)  # nothing was said
        sought = self.norm(self.up(nn.functional.silu(self.down(largest))))
        return (torch.einsum("bjd,bd->bj", mixed.amax(2), sought) / self.temperature).softmax(-1)


class Attempt(OfMergedParts, Method):
    """Prompts of other tasks, mixed for each text.

    Example:
        injection = peftcore.apply(model, "attempt", tasks=["sums", "letters"])
        peftcore.call(model, task="sums")  # or a list, one for each row; with `with`, for a while
    """

    name = "attempt"
    Config = AttemptConfig
    tags = Tags(category="multitask", paper="2205.11961", identity_at_init=False, per_row=False, routes="sequence")
    learning_rate = LearningRate(
        0.3, "AkariAsai/ATTEMPT@b5121e5, attempt/configs/attempt/sinlge_task.json", on="T5-base, MRPC"
    )
    target = "stack"
    config_version = 2
    former_defaults = ({"train_norm": True},)

    def inject(self, model: nn.Module, config: AttemptConfig, surgeon: Surgeon) -> None:
        for members in collected(surgeon, config).values():
            first = next(iter(members.values()))
            site = first.site
            lengths: set[Any] = {graft.operator.length for graft in members.values()}
            if lengths != {length_of(config.parts[0])}:
                raise UnsupportedSite(
                    f"{site.path}: sources have lengths {sorted(lengths)}; remove length from the parts' overrides"
                )
            surgeon.graft(site, AttemptOperator, config, first.holders[1:], members=members)

    def parts_gathered(self, injection: AppliedMethod) -> None:
        operators: Any = injection.operators
        for each in operators.values():
            each.start()

    def trainable(self, model: nn.Module, config: AttemptConfig, injection: AppliedMethod) -> None:
        if config.train_parts:
            super().trainable(model, config, injection)
        for each in injection.operators.values():
            for name, parameter in each.named_parameters():
                if not name.startswith("parts."):
                    parameter.requires_grad_(True)

    @staticmethod
    def parameter_count(site: Site, config: AttemptConfig) -> int:
        width, length = site.out_features, length_of(config.parts[0])
        own = task_count(config) * length * width + 2 * config.hidden * width + 2 * width * config.train_norm
        return own + OfMergedParts.parameter_count(site, config)
