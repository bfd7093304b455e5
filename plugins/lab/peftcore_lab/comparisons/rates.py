"""Learning rates that are chosen for each method: the same rates are tried for all methods, on examples that the report
does not use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftcore.errors import BadInput, TrainingError
from peftcore_lab.comparisons.comparison import Candidate, Comparison
from peftcore_lab.data.splits import parted
from peftcore_lab.reports.trials import ComparisonReport


def on_tuning(comparison: Comparison) -> tuple[Comparison, Comparison]:
    """Return two comparisons, which train on the same examples. The first one tries each method with each rate, scored
    on a tuning set. The second one is to be reported; its methods still lack rates.

    Raises:
        BadInput: a method already has a rate, the examples cannot be read, or there are too few examples.
    """
    if own := [each.called for each in comparison.methods if each.learning_rate is not None]:
        raise BadInput(f"{own[0]} sets its own learning_rate, and tune_lr chooses the rates: remove one of the two")
    chosen_by, reported = parted(comparison.data, comparison.tuning, comparison.tuning_size, comparison.out / "data")
    tried = [
        each.model_copy(update={"learning_rate": rate, "label": _label(each, rate)})
        for each in comparison.methods
        for rate in comparison.tune_lr
    ]
    rest: dict[str, Any] = {"tune_lr": [], "tuning": None, "tuning_size": None}
    tuning = {"data": chosen_by, "methods": tried, "seeds": comparison.seeds[:1], "out": comparison.out / "tuning"}
    return comparison.model_copy(update={**rest, **tuning}), comparison.model_copy(update={**rest, "data": reported})


def chosen(comparison: Comparison, report: ComparisonReport) -> tuple[list[Candidate], str]:
    """Return the methods with their best rates, and a sentence about how the rates were chosen.

    Raises:
        TrainingError: the training of a method failed with every rate.
    """
    scores = {entry.label: entry.score for entry in report.entries()}
    found, edges = [], list[str]()
    for each in comparison.methods:
        rates = [rate for rate in comparison.tune_lr if _label(each, rate) in scores]
        if not rates:
            raise TrainingError(f"{each.called}: {report.failed.get(_label(each, comparison.tune_lr[0]), 'no score')}")
        best = rates[0]
        for rate in rates[1:]:
            if report.better(scores[_label(each, rate)], scores[_label(each, best)]):
                best = rate
        if len(comparison.tune_lr) > 1 and best in (min(comparison.tune_lr), max(comparison.tune_lr)):
            edges.append(f"{each.called} ({best:g})")
        found.append(each.model_copy(update={"learning_rate": best}))
    return found, _said(comparison.tune_lr, report, edges)


def _said(rates: Sequence[float], report: ComparisonReport, edges: Sequence[str]) -> str:
    listed = ", ".join(f"{rate:g}" for rate in rates)
    text = f"Learning rates were chosen from {listed} on {report.held_out_size:,} tuning examples."
    return f"{text} The best was the smallest or the largest for {', '.join(edges)}." if edges else text


def _label(candidate: Candidate, rate: float) -> str:
    return f"{candidate.called} at {rate:g}"
