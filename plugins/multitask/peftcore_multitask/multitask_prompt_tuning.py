"""MPT: multitask prompt tuning.   Wang et al. 2023, arXiv 2303.02861.

Equation:
    X' = [P_t ; E(ids)],   P_t = P * (u_t v_t)      (* entry by entry)

P [length, d] is shared by all tasks; u_t [length, rank] and v_t [rank, d] are the task's own, of rank 1 in the paper.
P_t is inserted in front of the embedded tokens exactly as in prompt_tuning, and is computed in the precision of its
parameters. The call passes the task by ``with peftcore.call(model, task=...)``: one task for all rows, or one for each
row.

Parameters: length * d + tasks * rank * (length + d).

Start: P as in prompt_tuning. u_t v_t starts as all ones, so that each task begins at P: the first column of u and the
first row of v are ones, further rows of v zeros, further columns of u N(0, 0.02). ``task_init="normal"`` is peft's
start, N(0, 0.02) for both: then P_t starts some thousand times smaller than P, and learns slowly. No start is an
identity.

Differs from the authors' code: The paper trains many source tasks with losses that distil a teacher's prompt for each;
here, as in peft, only the model's loss is used. For a target task, the paper starts from P and from u and v of one
source task, or their mean over source tasks; to do the same, copy the tensors.

Use it: `peftcore.apply(model, "multitask_prompt_tuning", tasks=["sums", "letters"])`, where many tasks share one large
model and a new one has few examples: it costs length + d numbers more.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, SequenceOperator, SequenceSite, Site, Surgeon, Tags, full_precision
from peftcore.errors import ConfigError
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count


class MultitaskPromptTuningConfig(TaskConfig):
    """Options of multitask prompt tuning."""

    method: Literal["multitask_prompt_tuning"] = "multitask_prompt_tuning"
    length: PositiveInt = 20
    """Rows of the prompt; 100 in the paper."""
    rank: PositiveInt = 1
    """Rank of the factors of each task."""
    init: Literal["vocabulary", "uniform"] = "vocabulary"
    """Start the shared prompt from embeddings of tokens drawn from the vocabulary, or uniform in +-0.5."""
    init_ids: list[NonNegativeInt] = Field(default_factory=list)
    """Token ids whose embeddings initialize the shared prompt instead of `init`. They are repeated or cut to the
    prompt's length."""
    task_init: Literal["ones", "normal"] = "ones"
    """"ones" starts every task at the shared prompt. "normal" starts every task close to zero, as peft does."""


class MultitaskPromptOperator(SequenceOperator):
    """The shared prompt of one stack, and the factors with which tasks scale it."""

    def __init__(self, site: SequenceSite, config: MultitaskPromptTuningConfig) -> None:
        super().__init__(site, config.length)
        self.tasks, count = Tasks(site, config), task_count(config)
        if config.init == "vocabulary" or config.init_ids:
            start = site.embedded(_ids(site.in_features, config))
        else:
            start = torch.rand(config.length, self.width) - 0.5
        self.prompt = nn.Parameter(start.to(torch.float32, copy=True))
        self.u = nn.Parameter(torch.randn(count, config.length, config.rank) * 0.02)
        self.v = nn.Parameter(torch.randn(count, config.rank, self.width) * 0.02)
        if config.task_init == "ones":
            with torch.no_grad():
                self.u[..., 0] = 1.0
                self.v[:, 0], self.v[:, 1:] = 1.0, 0.0

    def rows(self, embeds: Tensor) -> Tensor:
        u, v = (self.tasks.of_rows(each, len(embeds)) for each in (self.u, self.v))
        with full_precision(embeds):
            return self.prompt * (u @ v)  # [1 or batch, length, width]


def _ids(vocabulary: int, config: MultitaskPromptTuningConfig) -> Tensor:
    """Return the tokens whose embeddings the shared prompt starts from."""
    if not config.init_ids:
        return torch.randint(vocabulary, (config.length,))
    if max(config.init_ids) >= vocabulary:
        raise ConfigError(f"init_ids: {max(config.init_ids)} is not a token of a vocabulary of {vocabulary}")
    return torch.tensor(config.init_ids).repeat(-(-config.length // len(config.init_ids)))[: config.length]


class MultitaskPromptTuning(Method):
    """A trained prompt that all tasks share and each task scales.

    Example:
        injection = peftcore.apply(model, "multitask_prompt_tuning", tasks=["sums", "letters"])
        peftcore.call(model, task="sums")  # or a list, one for each row; with `with`, for a while
    """

    name = "multitask_prompt_tuning"
    Config = MultitaskPromptTuningConfig
    tags = Tags(category="multitask", paper="2303.02861", identity_at_init=False, per_row=False)
    learning_rate = LearningRate(
        1e-4,
        "huggingface/peft@5d602fd, examples/conditional_generation/multitask_prompt_tuning.ipynb",
        on="Flan-T5-base, SST-2 and MNLI",
    )
    target = "stack"

    def inject(self, model: nn.Module, config: MultitaskPromptTuningConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.sequence(site, MultitaskPromptOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: MultitaskPromptTuningConfig) -> int:
        length, width = config.length, site.out_features
        return length * width + task_count(config) * config.rank * (length + width)
