"""Multitask prompt tuning in peft's files (checked against peft 0.21).

``prompt_embeddings`` [rows, width] is the shared prompt. ``prefix_task_cols`` [tasks, rows, rank] and
``prefix_task_rows`` [tasks, rank, width] are the factors u and v of `multitask_prompt_tuning`. In an encoder-decoder,
the first half of the rows may belong to the encoder and the second half to the decoder; v is the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author.formats import ROWS, Found, Keys, Place, SavedSite, SoftPrompt, halves
from peftcore.errors import ExportError
from peftcore_multitask._tasks import task_count

COLS, TASK_ROWS = "prefix_task_cols", "prefix_task_rows"


class PeftMultitaskPrompt(SoftPrompt):
    """Translates a prompt that tasks share, and the factors of each task."""

    methods = ("multitask_prompt_tuning",)
    root = (ROWS, COLS, TASK_ROWS)
    most_stacks = 2
    advice: ClassVar[Mapping[str, str]] = {
        "prompt_tuning_init": "use init=",
        "prompt_tuning_init_text": "use init_ids=",
        "tokenizer_name_or_path": "leave it out: init_ids= has the ids",
        "tokenizer_kwargs": "leave it out: init_ids= has the ids",
        "prompt_tuning_init_state_dict_path": "load the adapter to start from, and continue training",
        "prompt_tuning_init_task": "load the adapter to start from, and continue training",
        "num_ranks": "use rank=",
        "num_tasks": "use tasks=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
        keys.pass_over("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task")
        self.check_rows(keys, shapes)
        tasks, rank = keys.take("num_tasks", int, 1), keys.take("num_ranks", int, 1)
        return {
            "method": "multitask_prompt_tuning",
            "length": self.shared_options(keys),
            "tasks": tasks,
            "rank": rank,
        }

    def selections(self, keys: Keys, sites: Sequence[SavedSite], model: nn.Module) -> dict[str, tuple[SavedSite, ...]]:
        return {"": self.stacks(keys, model, ("stack", "stack.decoder")[: halves(keys)])}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        operator, count = place.operator, place.count
        (length, width), (tasks, _, rank) = operator.prompt.shape, operator.u.shape
        half = slice(length, None) if place.site.stack.reads else slice(length)
        return {
            "prompt": found.take(ROWS, (length * count, width))[half],
            "u": found.take(COLS, (tasks, length * count, rank))[:, half],
            "v": found.take(TASK_ROWS, operator.v.shape),
        }

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "num_virtual_tokens": config.length,
            "num_tasks": task_count(config),
            "num_ranks": config.rank,
            "prompt_tuning_init": "RANDOM",
        }

    def write_all(self, places: Sequence[Place]) -> dict[str, Tensor]:
        operators = [place.operator for place in sorted(places, key=lambda place: place.site.stack.reads)]
        v = operators[0].v
        if not all(torch.equal(v, each.v) for each in operators):
            raise ExportError(
                "peft has one v for encoder and decoder, but this adapter learned different ones; save it in "
                "peftcore's own format"
            )
        return {
            ROWS: torch.cat([each.prompt for each in operators]),
            COLS: torch.cat([each.u for each in operators], dim=1),
            TASK_ROWS: v,
        }
