"""The outcome of a search, as JSON and as a configuration file for ``peftcore train``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from peftcore.files.safe_io import write_text
from peftcore_lab.reports.trials import ComparisonReport, ConfigurationTrials
from peftcore_lab.runs.run import Run
from peftcore_lab.searching.budget import Budget
from peftcore_lab.searching.studies import LOST, REASON


@dataclass(frozen=True)
class SearchOutcome:
    """The study of a search, and its outcome."""

    trials: list[FrozenTrial]
    tried: ComparisonReport
    """The runs of the study, on the tuning split."""
    confirmed: ComparisonReport
    """The best configurations of the study, trained with all seeds and scored on the tuning split."""
    pick: ConfigurationTrials
    """The best configuration of `confirmed`."""
    report: ComparisonReport
    """The report of the chosen configuration (`pick`) on the held-out examples."""
    budget: Budget
    left_out: dict[str, str]
    """Methods without a configuration that fits into the budget, with the reasons."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "budget": asdict(self.budget),
            "left_out": self.left_out,
            "trials": [told(each) for each in self.trials],
            "front": [entry.label for entry in self.tried.front()],
            "confirmed": [_scored(entry) for entry in self.confirmed.entries()],
            "pick": {
                **_scored(self.pick),
                "method": self.pick.trials[0].method,
                "options": self.pick.trials[0].options,
                "learning_rate": self.pick.trials[0].learning_rate,
            },
            "report": json.loads(self.report.as_json()),
        }

    def as_json(self) -> str:
        """Return the outcome as JSON, for programs."""
        return json.dumps(self.as_dict(), indent=2) + "\n"


def _scored(entry: ConfigurationTrials) -> dict[str, Any]:
    scores = {"score": entry.score, "error": entry.error, "seeds": [each.seed for each in entry.trials]}
    return {"label": entry.label, "trainable": entry.trainable, **scores}


def told(trial: FrozenTrial) -> dict[str, Any]:
    """Return the number, options, score and state of a trial, for reports."""
    values = dict(zip(("score", "trainable"), trial.values or (), strict=False))
    lost = trial.state is TrialState.FAIL and LOST in trial.user_attrs
    return {
        "number": trial.number,
        "state": "lost" if lost else NAMES[trial.state],
        "parameters": {name.partition(".")[2] or name: _value(value) for name, value in trial.params.items()},
        "score": values.get("score"),
        "trainable": values.get("trainable"),
        "reason": trial.user_attrs.get(REASON),
    }


NAMES = {
    TrialState.COMPLETE: "trained",
    TrialState.PRUNED: "skipped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
"""Names for the trial states of optuna in reports."""


def _value(value: Any) -> Any:
    """Return a value of an option from the study. Values that are texts are decoded from JSON, except the method's
    name."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def write_best(run: Run, out: Path) -> None:
    """Write ``best.yaml``, with which ``peftcore train`` trains the chosen configuration (the pick) in a separate
    run."""
    whole = run.model_dump(mode="json", exclude_none=True)
    whole["model"], *places = absolute([whole["model"], whole["data"]["train"], whole["data"]["held_out"]])
    whole["data"].update(zip(("train", "held_out"), places, strict=True))
    whole["out"] = str((out / "best").resolve())
    head = "# The pick of a search. peftcore train best.yaml trains it again.\n"
    write_text(out / "best.yaml", head + yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))


def absolute(names: Iterable[str]) -> list[str]:
    """Return the names with paths made absolute. Names on the Hub are unchanged."""
    return [str(Path(name).resolve()) if Path(name).exists() else name for name in names]
