"""Comparisons on any module, with functions of the user for training and scoring."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftcore
from peftcore.errors import BadInput, TrainingError
from peftcore_lab.comparisons.comparison import Candidate
from peftcore_lab.reports import paper_tables
from peftcore_lab.reports.trials import ComparisonReport, Trial
from peftcore_lab.runs.folder import made
from peftcore_lab.runs.reading import validated
from peftcore_lab.runs.run import FULL

Train = Callable[[nn.Module, "peftcore.Injection | None"], object]
"""A function that trains an adapted model; its second argument is the adapter, or None in full fine-tuning."""
Score = Callable[[nn.Module], float]
"""A function that returns the score of a model on held-out examples."""


@dataclass(frozen=True)
class Compared:
    """The result of a comparison. In a notebook it is shown as a table."""

    report: ComparisonReport

    @property
    def lines(self) -> list[paper_tables.ConfigurationLine]:
        """The rows of the table: for each configuration the mean of the score over seeds, its standard deviation, and
        the seeds."""
        return paper_tables.lines(self.report)

    def as_csv(self) -> str:
        """Return the table as CSV."""
        return paper_tables.as_csv(self.report)

    def as_markdown(self) -> str:
        """Return the table in Markdown."""
        return paper_tables.as_markdown(self.report)

    def as_latex(self) -> str:
        """Return the table in LaTeX, for booktabs."""
        return paper_tables.as_latex(self.report)

    def write(self, folder: Path | str) -> None:
        """Write ``results.json``, and the table as ``results.csv``, ``.md`` and ``.tex``."""
        paper_tables.write(self.report, made(Path(folder)))

    _repr_markdown_ = __str__ = as_markdown


def compare(
    model: nn.Module | Callable[[], nn.Module],
    methods: Sequence[str | Mapping[str, Any]],
    *,
    train: Train,
    score: Score,
    seeds: Sequence[int] = (0,),
    metric: str = "score",
    greater: bool = True,
) -> Compared:
    """Fine-tune a model with several methods, each with each seed, and compare what each costs and gains.

    Args:
        model: the model, which is copied for each run; or a function that returns a new model, if memory is too small
            for two.
        methods: names, or names with options: ``{"name": "lora", "rank": 4, "target": "all-linear", "label": "few"}``;
            "full" is full fine-tuning. Two configurations of one method need different labels.
        train: trains ``injection.parameters()``, or ``model.parameters()`` in full fine-tuning; called as
            ``train(model, injection)`` with torch's generator at the run's seed.
        score: returns a number for a model, called before and after.
        seeds: the seeds of the adapters' initial values and of torch's generator.
        metric: the name of the score.
        greater: whether a higher score is better.

    Returns:
        The results, as data (`lines`) and as tables for a paper. A method whose training ended in a `TrainingError` is
        in ``report.failed``.

    Raises:
        BadInput: methods or seeds are missing, or two configurations have one name.
        TargetError, ConfigError, UnknownMethod: a method cannot act on the model. Nothing was trained.
        TrainingError: every training failed.
    """
    candidates = _candidates(methods)
    if not candidates or not seeds:
        raise BadInput("a comparison needs a method and a seed")
    _check(model, candidates)
    began = time.perf_counter()
    trials: list[Trial] = []
    failed: dict[str, str] = {}
    for candidate in candidates:
        for seed in seeds:
            try:
                trials.append(_trial(model, candidate, seed, train, score, metric))
            except TrainingError as error:
                failed[candidate.called] = str(error)
    if not trials:
        raise TrainingError("; ".join(f"{label}: {reason}" for label, reason in failed.items()))
    kind = model if isinstance(model, nn.Module) else _made(model)
    return Compared(
        ComparisonReport(
            model=type(kind).__name__,
            task="",
            data="",
            metric=metric,
            greater=greater,
            train_size=0,
            held_out_size=0,
            training={},
            trials=tuple(trials),
            seconds=time.perf_counter() - began,
            failed=failed,
        )
    )


def _candidates(methods: Sequence[str | Mapping[str, Any]]) -> list[Candidate]:
    listed = [methods] if isinstance(methods, str) else methods
    whole = [{"name": each} if isinstance(each, str) else dict(each) for each in listed]
    found = [validated(Candidate, each, "methods") for each in whole]
    labels = [candidate.called for candidate in found]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise BadInput(f"two configurations are called {min(repeated)}: set another label for one of them")
    return found


def _made(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    return copy.deepcopy(model) if isinstance(model, nn.Module) else model()


def _check(model: nn.Module | Callable[[], nn.Module], candidates: Sequence[Candidate]) -> None:
    """Plan every method before training, so that a method that cannot act on this model raises its error now."""
    host = model if isinstance(model, nn.Module) else model()
    for candidate in candidates:
        if candidate.name != FULL and not peftcore.method(candidate.name).asks_for_data(candidate.arguments):
            peftcore.plan(host, candidate.name, **candidate.arguments)


def _trial(
    model: nn.Module | Callable[[], nn.Module],
    candidate: Candidate,
    seed: int,
    train: Train,
    score: Score,
    metric: str,
) -> Trial:
    from peftcore_lab.training.memory import PeakMemory

    host = _made(model)
    torch.manual_seed(seed)
    if candidate.name == FULL:
        injection, learned = None, [*host.requires_grad_(True).parameters()]
    else:
        injection = peftcore.apply(host, candidate.name, seed=seed, **candidate.arguments)
        learned = [each for each in injection.parameters() if each.requires_grad]
    before = float(score(host))
    torch.manual_seed(seed)
    begun = time.perf_counter()
    with PeakMemory() as memory:
        train(host, injection)
    seconds = time.perf_counter() - begun
    return Trial(
        label=candidate.called,
        method=candidate.name,
        options=candidate.arguments,
        seed=seed,
        learning_rate=candidate.learning_rate,
        trainable=sum(each.numel() for each in learned),
        total=sum(each.numel() for each in host.parameters()),
        before={metric: before},
        after={metric: float(score(host))},
        curve=[],
        losses=[],
        seconds_per_step=seconds,
        peak_memory=memory.peak,
        file_size=_size(host, injection),
        folder="",
    )


def _size(host: nn.Module, injection: peftcore.Injection | None) -> int:
    """Return the size in bytes of the saved adapter, or of the whole model in full fine-tuning."""
    if injection is None:
        return sum(each.numel() * each.element_size() for each in host.parameters())
    with tempfile.TemporaryDirectory() as folder:
        injection.save(folder)
        return sum(file.stat().st_size for file in Path(folder).iterdir())
