"""A comparison as a table in the terminal, with one row for each configuration."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from peftcore.utils.numbers import size
from peftcore_lab.reports import paper_tables
from peftcore_lab.reports.trials import ComparisonReport, ConfigurationTrials


def table(report: ComparisonReport) -> Table:
    """Return a table with one row for each configuration. The best score is bold."""
    entries = report.entries()
    best = max(entries, key=lambda each: each.score if report.greater else -each.score)
    found = Table(box=box.SIMPLE_HEAD, title=title(report), caption=caption(report, entries), title_justify="left")
    found.padding, found.pad_edge = (0, 0, 0, 1), False
    found.caption_justify = "left"
    found.add_column("method", no_wrap=True)
    apart = [{each.label: each.score for each in report.of_task(task).entries()} for task in report.tasks]
    for heading in (
        "trainable",
        "share",
        "before",
        "after",
        *map(escape, report.tasks),
        "s/step",
        "peak\nmemory",
        "saved\nfile",
    ):
        found.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        first, score = entry.trials[0], number(entry.score)
        found.add_row(
            entry.label,
            f"{entry.trainable:,}",
            f"{first.share:.2%}",
            number(first.before[report.metric]),
            f"[bold]{score}[/bold]" if entry is best else score,
            *(number(scores[entry.label]) for scores in apart),
            f"{entry.seconds_per_step:.2f}",
            size(entry.peak_memory),
            size(first.file_size),
        )
    return found


def title(report: ComparisonReport) -> str:
    """Return the title: the metric, the number of validation examples and the length of training."""
    chosen = report.training
    length = f"{chosen['steps']} steps" if chosen["steps"] else f"{chosen['epochs'] or 3:g} epochs"
    return (
        f"{report.metric.capitalize()} on {report.held_out_size:,} validation examples after {length} of "
        f"{chosen['batch_size']}"
    )


def caption(report: ComparisonReport, entries: list[ConfigurationTrials]) -> str:
    """Return the caption: the reference values for the scores, such as the majority baseline."""
    errors = [entry.error for entry in entries if entry.error is not None]
    floor = [] if report.floor is None else [f"Majority baseline: {report.floor:.3f}."]
    error = [f"Standard error: {max(errors):.3f}."] if errors else []
    failed = [f"Failed: {label} ({reason})." for label, reason in report.failed.items()]
    runs = f"{len(report.trials)} runs in {report.seconds / 60:.1f} minutes."
    tuned = [report.tuned] if report.tuned else []
    return "\n".join([" ".join([*floor, *error, runs, *failed]), *report.together, *tuned, *settings(entries)])


def settings(entries: list[ConfigurationTrials]) -> list[str]:
    """Return a line for each combination of target and learning rate, with the configurations that have it."""
    groups: dict[str, list[str]] = {}
    for entry in entries:
        first = entry.trials[0]
        shared = f"{paper_tables.target_of(first)}, learning rate {first.learning_rate:g}"
        groups.setdefault(shared, []).append(entry.label)
    return [f"{', '.join(labels)}: {shared}" for shared, labels in groups.items()]


def number(value: float) -> str:
    """Format a number with three decimals if its magnitude is below 10, otherwise with four digits."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
