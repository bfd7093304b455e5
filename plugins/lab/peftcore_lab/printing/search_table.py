"""A search as a table in the terminal: the Pareto front of its study, with the chosen configuration in bold."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from peftcore_lab.printing.comparison_table import number
from peftcore_lab.searching.search_outcome import SearchOutcome, told


def table(search: SearchOutcome) -> Table:
    """Return a table of the Pareto front of the study, with the chosen configuration (the pick) in bold."""
    means = {entry.label: entry for entry in search.confirmed.entries()}
    found = Table(box=box.SIMPLE_HEAD, title=title(search), caption=caption(search), title_justify="left")
    found.caption_justify, found.padding, found.pad_edge = "left", (0, 0, 0, 1), False
    for heading in ("on the front", "options"):
        found.add_column(heading, overflow="fold")
    for heading in ("lr", "trainable", "tuning", f"{len(search.confirmed.entries()[0].trials)} seeds"):
        found.add_column(heading, justify="right", no_wrap=True)
    shown = search.tried.front()
    if search.pick.label not in [entry.label for entry in shown]:
        shown = [*shown, next(each for each in search.tried.entries() if each.label == search.pick.label)]
    for entry in shown:
        first = entry.trials[0]
        found.add_row(
            entry.label,
            " ".join(f"{name}={spelled(value)}" for name, value in first.options.items()),
            f"{first.learning_rate:.2g}",
            f"{entry.trainable:,}",
            number(entry.score),
            number(means[entry.label].score) if entry.label in means else "",
            style="bold" if entry.label == search.pick.label else "",
        )
    return found


def title(search: SearchOutcome) -> str:
    limit = "" if search.budget.trainable is None else f", at most {search.budget.trainable:,} trainable parameters"
    return f"{search.tried.metric.capitalize()} on {search.tried.held_out_size:,} tuning examples{limit}"


def caption(search: SearchOutcome) -> str:
    states = [told(each)["state"] for each in search.trials]
    skipped, failed = states.count("skipped"), states.count("failed")
    words = [f"{len(search.tried.trials)} trials trained, {skipped} planned and not trained, {failed} failed."]
    words += [f"Left out: {name} ({reason})." for name, reason in search.left_out.items()]
    return "\n".join([" ".join(words), *search.tried.together])


def spelled(value: Any) -> str:
    """Format a value of an option. Long lists, as of excluded layers, are shortened to the first entry and the number
    of the others."""
    if isinstance(value, list):
        return "+".join(map(str, value)) if len(value) < 3 else f"{value[0]}+{len(value) - 1} more"
    return str(value)
