"""Polytropon in files of peft, which calls it POLY (checked against peft 0.21).

``poly_lora_A`` [splits, skills, in / splits, rank] and ``poly_lora_B`` [splits, skills, rank, out / splits] are the
transposed A and B of `polytropon`. The logits of a task are one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place, task_of
from peftcore.errors import ExportError
from peftcore_multitask._tasks import task_count

A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


class PeftPoly(PeftMethod):
    """Translates skills and the logits of tasks."""

    methods = ("polytropon",)
    below = (A, B, LOGITS)
    kinds = (nn.Linear,)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "poly_type": "leave it out: peftcore has Polytropon's routing only",
        "n_tasks": "use tasks=",
        "n_skills": "use skills=",
        "n_splits": "use splits=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.only("poly_type", "poly")
        return {
            "method": "polytropon",
            "rank": keys.take("r", int, 8),
            "tasks": keys.take("n_tasks", int, 1),
            "skills": keys.take("n_skills", int, 4),
            "splits": keys.take("n_splits", int, 1),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        operator = place.operator
        tasks, *lead = operator.logits.shape
        return {
            "A": found.take(A, operator.A.mT.shape).mT,
            "B": found.take(B, operator.B.mT.shape).mT,
            "logits": found.take(LOGITS, (tasks, lead[0] * lead[1])).view(tasks, *lead),
        }

    def write_options(self, config: Any) -> dict[str, Any]:
        if config.own_skills:
            raise ExportError(
                "peft's POLY cannot hold own_skills: apply with own_skills=0, or save in peftcore's own format"
            )
        return {
            "r": config.rank,
            "n_tasks": task_count(config),
            "n_skills": config.skills,
            "n_splits": config.splits,
            "poly_type": "poly",
        }

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        return {"task_type": task_of(model)}  # without a task peft hands no tasks of rows on

    def write(self, place: Place) -> dict[str, Tensor]:
        operator = place.operator
        return {A: operator.A.mT, B: operator.B.mT, LOGITS: operator.logits.flatten(1)}
