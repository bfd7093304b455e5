"""The report of a comparison as one HTML file. It loads nothing from a network, and only its own script can run in
it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from peftcore.utils.numbers import counted, listed
from peftcore_lab.reports import curves, plots, report_text
from peftcore_lab.reports.labels import plain
from peftcore_lab.reports.plots import DARK, LIGHT, Cost, Shape
from peftcore_lab.reports.svg import inline
from peftcore_lab.reports.trials import ComparisonReport

WIDE, HALF, NARROW = Shape(900, 430, 30), Shape(520, 370, 22), Shape(360, 400, 16)
"""Shapes of charts: over the whole width of the page, next to another chart, and on a phone. Text has the same size in
all of them."""
CROWD = 8
"""The largest number of points for which all names have room in a chart."""

Drawing = Callable[[Shape], Figure]


def page(report: ComparisonReport, folder: Path | None = None) -> str:
    """Return the whole document; `folder` is where the files of the comparison are."""
    environment = Environment(loader=PackageLoader("peftcore_lab.reports"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    script = own(environment, "compare.js")
    text = environment.get_template("compare.html").render(
        title=heading(report),
        report=report,
        findings=report_text.findings(report),
        facts=report_text.facts(report),
        settings=report_text.settings(report),
        columns=report_text.columns(report),
        rows=report_text.rows(report),
        runs=report_text.runs(report),
        charts=charts(report),
        pictures=pictures(report, folder) if folder is not None else [],
        error=report_text.error(report),
        beyond=plots.split(report, plots.points(report, plots.PARAMETERS))[1],
        reference=any(map(plots.is_reference, report.entries())),
        several=any(len(entry.trials) > 1 for entry in report.entries()),
        light=asdict(LIGHT),
        dark=asdict(DARK),
        style=own(environment, "compare.css"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # the name of a file may hold what is no text


def own(environment: Environment, name: str) -> Markup:
    """Return the text of a template file that is inserted into the page unchanged."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def heading(report: ComparisonReport) -> str:
    count = len(report.entries()) + len(report.failed)
    return f"{counted(count, 'way')} to fine-tune {report.model_name}"


@dataclass(frozen=True)
class Chart:
    """One chart, drawn for a wide window and for a narrow one."""

    title: str
    caption: str
    whole: bool
    """Whether the chart fills the whole width of the page."""
    wide: Markup
    narrow: Markup


def charts(report: ComparisonReport) -> list[Chart]:
    """Return all charts of a report."""
    tips = {number: report_text.tip(report, entry) for number, entry in enumerate(report.entries(), 1)}
    if not plots.points(report, plots.PARAMETERS):
        return []
    with plots.style():
        return [
            trade_off(report, plots.PARAMETERS, WIDE, tips),
            trade_off(report, plots.MEMORY, HALF, tips),
            trade_off(report, plots.SECONDS, HALF, tips),
            *over_steps(report, report.metric, curves.scores(report), not report.greater, tips),
            *over_steps(report, "training loss", curves.losses(report), True, tips),
        ]


@dataclass(frozen=True)
class Picture:
    """A picture that the model of one configuration generated."""

    label: str
    source: str
    """The content of the picture, as a data URL."""


def pictures(report: ComparisonReport, folder: Path) -> list[Picture]:
    """Return the pictures that models generated: for each configuration that of its first seed."""
    found = []
    for entry in report.entries():
        file = folder / (entry.trials[0].picture or ".")
        if file.is_file():
            found.append(Picture(entry.label, f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"))
    return found


def trade_off(report: ComparisonReport, cost: Cost, shape: Shape, tips: dict[int, str]) -> Chart:
    """Return a chart of the metric over a cost."""
    drawn = plots.points(report, cost)
    best = listed(plain(point.entry.label) for point in drawn if point.best)
    crowd = " Where a name has no room, the number of its row is shown." if len(drawn) > CROWD else ""
    return chart(
        f"{capital(report.metric)} over {cost.name}",
        f"Configurations on the line are better than all with {cost.less}.{crowd}",
        f"One point a configuration; on the Pareto front are {best}. The table has the numbers.",
        lambda each: plots.trade_off(report, cost, each),
        shape,
        tips,
    )


def over_steps(
    report: ComparisonReport, name: str, lines: list[curves.Curve], ratios: bool, tips: dict[int, str]
) -> list[Chart]:
    """Return a chart of curves over the steps, or an empty list without curves."""
    if not lines:
        return []
    caption = curves.caption(lines)
    shape = HALF if curves.fit(lines) else WIDE
    description = f"One line a configuration. {caption}"
    title = f"{capital(name)} over steps"
    return [chart(title, caption, description, lambda each: curves.draw(lines, name, ratios, each), shape, tips)]


def chart(title: str, caption: str, description: str, draw: Drawing, shape: Shape, tips: dict[int, str]) -> Chart:
    name = "-".join(title.lower().split())
    wide, narrow = (
        Markup(inline(draw(each), f"{name}-{each.width}", title, description, tips)) for each in (shape, NARROW)
    )
    return Chart(title, caption, shape is WIDE, wide, narrow)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
