"""The report of a comparison as tables for a paper: CSV, Markdown and LaTeX. There is one row for each configuration,
with the mean of the metric over seeds, its standard deviation, and the seeds. If the examples belong to several tasks,
mean and standard deviation of each task are included."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import peftcore
from peftcore.files.safe_io import write_text
from peftcore.utils.numbers import decimals, fixed
from peftcore_lab.reports.trials import ComparisonReport, ConfigurationTrials, Trial
from peftcore_lab.runs.run import FULL


@dataclass(frozen=True)
class ConfigurationLine:
    """The values of one configuration in a table."""

    label: str
    target: str
    learning_rate: float | None
    trainable: int
    share: float
    mean: float
    deviation: float | None
    """The sample standard deviation over seeds; None with one seed."""
    seeds: tuple[int, ...]
    best: bool


def lines(report: ComparisonReport) -> list[ConfigurationLine]:
    """Return the rows of all configurations, in the order of the report."""
    entries = report.entries()
    finite = [each.score for each in entries if math.isfinite(each.score)]
    best = (max if report.greater else min)(finite, default=math.nan)
    return [_line(report, entry, entry.score == best) for entry in entries]


def _line(report: ComparisonReport, entry: ConfigurationTrials, best: bool) -> ConfigurationLine:
    first = entry.trials[0]
    scores = [trial.after[report.metric] for trial in entry.trials]
    deviation = statistics.stdev(scores) if len(scores) > 1 and all(map(math.isfinite, scores)) else None
    return ConfigurationLine(
        label=entry.label,
        target=target_of(first),
        learning_rate=first.learning_rate,
        trainable=entry.trainable,
        share=first.share,
        mean=entry.score,
        deviation=deviation,
        seeds=tuple(trial.seed for trial in entry.trials),
        best=best,
    )


def target_of(trial: Trial) -> str:
    """Return the target modules as a text: those that the user set, or else the method's defaults."""
    if trial.method == FULL:
        return "all parameters"
    target = trial.options.get("target") or peftcore.method(trial.method).target
    names = [target] if isinstance(target, str) else [str(each) for each in target]
    return " ".join(names) or "modules of its own"


def as_csv(report: ComparisonReport) -> str:
    """Return the table as CSV, with unrounded numbers."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    metric = report.metric
    named = [metric, *(f"{metric}/{task}" for task in report.tasks)]
    scores = [f"{name}_{what}" for name in named for what in ("mean", "std")]
    table.writerow(["method", "target", "learning_rate", "trainable", "share", *scores, "seeds"])
    for line, *apart in zip(*_all_lines(report), strict=True):
        found = [("" if each is None else each) for own in (line, *apart) for each in (own.mean, own.deviation)]
        seeds = " ".join(map(str, line.seeds))
        rate = "" if line.learning_rate is None else line.learning_rate
        table.writerow([line.label, line.target, rate, line.trainable, line.share, *found, seeds])
    return out.getvalue()


def _all_lines(report: ComparisonReport) -> list[list[ConfigurationLine]]:
    """Return the lines for the whole metric, followed by the lines for each task."""
    return [lines(report), *(lines(report.of_task(task)) for task in report.tasks)]


def as_markdown(report: ComparisonReport) -> str:
    """Return the table in Markdown; the best score is bold."""
    found = [f"| {' | '.join(map(_escaped, _names(report)))} |", "|---|---|" + "---:|" * (4 + len(report.tasks))]
    for line, *scores in zip(lines(report), *_columns(report, " ± "), strict=True):
        bold = [f"**{score}**" if best else score for score, best in scores]
        cells = [_escaped(line.label), _escaped(line.target), *_numbers(line), *bold]
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join([*found, "", _note(report)]) + "\n"


def as_latex(report: ComparisonReport) -> str:
    r"""Return the table in LaTeX, for ``\usepackage{booktabs}``; the best score is bold."""
    head = " & ".join(map(_tex, _names(report)))
    columns = "llrrrr" + "r" * len(report.tasks)
    found = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head + r" \\", r"\midrule"]
    for line, *scores in zip(lines(report), *_columns(report, r" \pm "), strict=True):
        cells = [_tex(line.label), _tex(line.target), *map(_tex, _numbers(line))]
        cells += [rf"$\mathbf{{{score}}}$" if best else f"${score}$" for score, best in scores]
        found.append(" & ".join(cells) + r" \\")
    return "\n".join([*found, r"\bottomrule", r"\end{tabular}", f"% {_note(report)}"]) + "\n"


def write(report: ComparisonReport, folder: Path) -> None:
    """Write ``results.json``, and the table as ``results.csv``, ``.md`` and ``.tex``."""
    write_text(folder / "results.json", report.as_json())
    for ending, text in {"csv": as_csv(report), "md": as_markdown(report), "tex": as_latex(report)}.items():
        write_text(folder / f"results.{ending}", text)


def _names(report: ComparisonReport) -> tuple[str, ...]:
    return "method", "target modules", "learning rate", "parameters", "share", report.metric, *report.tasks


def _numbers(line: ConfigurationLine) -> list[str]:
    rate = "" if line.learning_rate is None else f"{line.learning_rate:g}"
    return [rate, f"{line.trainable:,}", f"{100 * line.share:.3g}%"]


def _columns(report: ComparisonReport, between: str) -> list[list[tuple[str, bool]]]:
    """Return the columns of scores: for the whole metric and for each task. Each score has a flag that is True for the
    best one of its column."""
    reports = [report, *map(report.of_task, report.tasks)]
    return [[(_score(each, line, between), line.best) for line in lines(each)] for each in reports]


def _score(report: ComparisonReport, line: ConfigurationLine, between: str) -> str:
    places = decimals(entry.score for entry in report.entries())
    mean = fixed(line.mean, places)
    return mean if line.deviation is None else f"{mean}{between}{fixed(line.deviation, places)}"


def _note(report: ComparisonReport) -> str:
    seeds = sorted({trial.seed for trial in report.trials})
    over = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    where = f" on {report.held_out_size:,} validation examples" if report.held_out_size else ""
    return f"{report.metric}{where}, {over}"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def _tex(text: str) -> str:
    return (
        re.sub(r"[&%$#_{}]", lambda found: "\\" + found[0], text)
        .replace("~", r"\textasciitilde{}")
        .replace("^", r"\textasciicircum{}")
    )
