"""Advice for runs that are out of memory: settings to change, and the memory of a step with each change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peftcore.models.dry_run import RequestedMethod
from peftcore.models.model_names import Use
from peftcore.utils.numbers import size
from peftcore_lab.runs.run import FULL, Run
from peftcore_lab.tasks import task_catalogue
from peftcore_lab.tasks.task import Prepared
from peftcore_lab.training.estimates import Estimates, Step

MOST = 3
"""The largest number of changes that are listed."""


@dataclass(frozen=True)
class Knob:
    """A change of a run's settings that reduces its memory."""

    settings: Mapping[str, object]
    step: Step | None
    """The step of the run with this change; None if its memory cannot be estimated."""

    def __str__(self) -> str:
        return " ".join(f"--set {name}={value}" for name, value in self.settings.items())


def knobs(run: Run) -> list[Knob]:
    """Return possible changes of a run, the most useful one first."""
    chosen, now = run.training, step_of(run)
    found = []
    if chosen.batch_size > 1:
        half = chosen.batch_size // 2
        settings = {"training.batch_size": half, "training.accumulate": chosen.accumulate * 2}
        found.append(Knob(settings, replace(now, batch_size=half)))
    if not chosen.checkpoint_gradients:
        found.append(Knob({"training.checkpoint_gradients": "true"}, replace(now, checkpointed=True)))
    if run.dtype == "float32":
        found.append(Knob({"dtype": "bfloat16"}, replace(now, dtype="bfloat16")))
    if run.quantize is None:
        found.append(Knob({"quantize": "nf4"}, None))
    return found[:MOST]


def advice(run: Run, prepared: Prepared | None = None) -> str:
    """Return a text with settings that need less memory, and the memory of a step before and after each change, if it
    can be estimated.

    Args:
        run: the run that is out of memory.
        prepared: the model and examples of the run, if they are already loaded.
    """
    listed = knobs(run)
    if not listed:
        return "To need less memory, use a smaller model"
    counted = estimates(run, prepared)
    now = None if counted is None else counted.of(step_of(run))
    if counted is None or now is None:
        return f"To need less memory, use: {'; '.join(map(str, listed))}"
    sizes = [None if each.step is None else counted.of(each.step) for each in listed]
    said = ["" if each is None else f": about {size(each)}" for each in sizes]
    told = "; ".join(f"{knob}{each}" for knob, each in zip(listed, said, strict=True))
    return (
        f"A step needs about {size(now)} as peftcore plan estimates it (the peak is higher). To need less memory, "
        f"use: {told}"
    )


def step_of(run: Run) -> Step:
    return Step(run.training.batch_size, run.dtype, run.training.checkpoint_gradients)


def estimates(run: Run, prepared: Prepared | None) -> Estimates | None:
    """Return an object that estimates the memory of a run's steps; None if it cannot be estimated. This is so for
    quantized or sharded weights, autocast, a continued adapter, and pipelines, which need more memory than the planned
    part."""
    counted = task_catalogue.find(run.task).use in (Use.TEXT, Use.PICTURES)
    if not counted or run.quantize or run.adapter or run.training.shard or run.training.autocast:
        return None
    options = run.method.arguments
    target, exclude, train = options.pop("target", None), options.pop("exclude", None), options.pop("train", ())
    wanted = None if run.method.name == FULL else RequestedMethod(run.method.name, options, target, exclude, train)
    return Estimates(run.model, wanted, run.data.get("max_length") if prepared is None else longest(prepared.train))


def longest(examples: Any) -> int | None:
    """Return the number of tokens of the longest example; None if the examples are not texts."""
    tokens = [len(each["input_ids"]) for each in examples if "input_ids" in each] if isinstance(examples, list) else []
    return max(tokens, default=None)
