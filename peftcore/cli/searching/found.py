"""What a search found: a table, JSON, and the configuration that ``peftcore train`` takes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.table import Table

from peftcore.cli.comparing.report import number
from peftcore.cli.comparing.trials import Entry, Report
from peftcore.cli.searching.budget import Budget
from peftcore.cli.searching.studies import LOST, REASON
from peftcore.cli.training.runs import Run
from peftcore.files.safe_io import write_text


@dataclass(frozen=True)
class Found:
    """The study, and what became of it."""

    trials: list[FrozenTrial]
    tried: Report
    """The runs of the study, on the tuning split."""
    confirmed: Report
    """The best of them with all seeds, on the tuning split."""
    pick: Entry
    """The best of these."""
    report: Report
    """The pick on the held-out examples."""
    budget: Budget
    left_out: dict[str, str]
    """Methods of which nothing fits, and why."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "budget": asdict(self.budget),
            "left_out": self.left_out,
            "trials": [_told(each) for each in self.trials],
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
        """For programs."""
        return json.dumps(self.as_dict(), indent=2) + "\n"

    def table(self) -> Table:
        """The Pareto front of the study, the pick in bold."""
        means = {entry.label: entry for entry in self.confirmed.entries()}
        found = Table(box=box.SIMPLE_HEAD, title=self._title(), caption=self._caption(), title_justify="left")
        found.caption_justify, found.padding, found.pad_edge = "left", (0, 0, 0, 1), False
        for heading in ("on the front", "options"):
            found.add_column(heading, overflow="fold")
        for heading in ("lr", "trainable", "tuning", f"{len(self.confirmed.entries()[0].trials)} seeds"):
            found.add_column(heading, justify="right", no_wrap=True)
        shown = self.tried.front()
        if self.pick.label not in [entry.label for entry in shown]:
            shown = [*shown, next(each for each in self.tried.entries() if each.label == self.pick.label)]
        for entry in shown:
            first = entry.trials[0]
            found.add_row(
                entry.label,
                " ".join(f"{name}={_spelled(value)}" for name, value in first.options.items()),
                f"{first.learning_rate:.2g}",
                f"{entry.trainable:,}",
                number(entry.score),
                number(means[entry.label].score) if entry.label in means else "",
                style="bold" if entry.label == self.pick.label else "",
            )
        return found

    def _title(self) -> str:
        limit = "" if self.budget.trainable is None else f", at most {self.budget.trainable:,} trainable values"
        return f"{self.tried.metric.capitalize()} on {self.tried.held_out_size:,} tuning examples{limit}"

    def _caption(self) -> str:
        states = [_told(each)["state"] for each in self.trials]
        skipped, failed = states.count("skipped"), states.count("failed")
        words = [f"{len(self.tried.trials)} trials trained, {skipped} planned and not trained, {failed} failed."]
        words += [f"Left out: {name} ({reason})." for name, reason in self.left_out.items()]
        return " ".join(words)


def _spelled(value: Any) -> str:
    """Many layers that are left out are a number."""
    if isinstance(value, list):
        return "+".join(map(str, value)) if len(value) < 3 else f"{value[0]}+{len(value) - 1} more"
    return str(value)


def _scored(entry: Entry) -> dict[str, Any]:
    scores = {"score": entry.score, "error": entry.error, "seeds": [each.seed for each in entry.trials]}
    return {"label": entry.label, "trainable": entry.trainable, **scores}


def _told(trial: FrozenTrial) -> dict[str, Any]:
    """One trial of the study."""
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
"""States of optuna, in our words."""


def _value(value: Any) -> Any:
    """Texts are the JSON that optuna was told, but for the method's name."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def write_best(run: Run, out: Path) -> None:
    """``best.yaml``: the pick, as a run of its own."""
    whole = run.model_dump(mode="json", exclude_none=True)
    whole["model"], *places = absolute([whole["model"], whole["data"]["train"], whole["data"]["held_out"]])
    whole["data"].update(zip(("train", "held_out"), places, strict=True))
    whole["out"] = str((out / "best").resolve())
    head = "# The pick of a search. peftcore train best.yaml trains it again.\n"
    write_text(out / "best.yaml", head + yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))


def absolute(names: Iterable[str]) -> list[str]:
    """Paths that hold from everywhere; names of the Hub as they are."""
    return [str(Path(name).resolve()) if Path(name).exists() else name for name in names]
