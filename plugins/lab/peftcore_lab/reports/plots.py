"""Charts of the metric over a cost, with one named point for each configuration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from peftcore.utils.numbers import decimals, fixed, short, size
from peftcore_lab.reports.labels import Box, LabelOffset, Taken, Wish, along, around, extent, fitted, place, shorten
from peftcore_lab.reports.trials import ComparisonReport, ConfigurationTrials, front
from peftcore_lab.runs.run import FULL

PIXELS = 72
"""Dots per inch during the layout of a chart, so that one typographic point is one pixel of CSS."""
RANGE = 30
"""If the ratio of the largest to the smallest value is above this number, the scale is logarithmic."""

Line = list[tuple[float, float]]
"""Points of the data that a line connects."""


@dataclass(frozen=True)
class Palette:
    """Colours that colour-blind readers can distinguish: those of Okabe and Ito, adjusted to the background."""

    ground: str = "#ffffff"
    surface: str = "#fdfdfe"
    ink: str = "#1b1f24"
    quiet: str = "#5c6670"
    grid: str = "#e4e7eb"
    blue: str = "#0072b2"
    red: str = "#d55e00"
    green: str = "#009e73"
    purple: str = "#b5568f"
    amber: str = "#c98a00"
    sky: str = "#56b4e9"


LIGHT = Palette()
DARK = Palette(
    ground="#14171a",
    surface="#1b1f23",
    ink="#e9ecef",
    quiet="#a3acb5",
    grid="#31373d",
    blue="#4aa5e0",
    red="#f0813d",
    green="#2dc39a",
    purple="#dd8fbe",
    amber="#edb83d",
    sky="#a3d8f7",
)


@dataclass(frozen=True)
class Shape:
    """The size of a chart in pixels of CSS, and the maximum length of names in it."""

    width: int
    height: int
    name: int


PICTURE = Shape(850, 520, 32)


@dataclass(frozen=True)
class Cost:
    """A kind of cost of configurations; a lower cost is better."""

    name: str
    less: str
    """Words for a lower cost, such as "fewer trainable parameters"."""
    of: Callable[[ConfigurationTrials], float]
    shown: Callable[[float], str]
    log: bool = False


PARAMETERS = Cost("trainable parameters", "fewer trainable parameters", attrgetter("trainable"), short, log=True)
MEMORY = Cost("peak memory", "less memory", attrgetter("peak_memory"), size)
SECONDS = Cost("seconds per step", "less time", attrgetter("seconds_per_step"), lambda value: f"{value:.3g}")


@contextmanager
def style() -> Iterator[None]:
    """Context manager in which charts have the style of the report, independent of the user's settings of
    matplotlib."""
    settings: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 12.0,
        "text.color": LIGHT.ink,
        "axes.edgecolor": LIGHT.grid,
        "axes.labelcolor": LIGHT.quiet,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": LIGHT.grid,
        "grid.linewidth": 0.8,
        "xtick.color": LIGHT.grid,
        "ytick.color": LIGHT.grid,
        "xtick.labelcolor": LIGHT.quiet,
        "ytick.labelcolor": LIGHT.quiet,
        "ytick.major.size": 0.0,
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def new_figure(shape: Shape) -> Figure:
    """Return a figure that is created without pyplot, so that no display is used and no figure remains open."""
    figure = Figure(figsize=(shape.width / PIXELS, shape.height / PIXELS), dpi=PIXELS)
    FigureCanvasAgg(figure)  # measures text
    return figure


def settle(figure: Figure, right: float = 0, between: float = 0.02) -> None:
    """Compute the final layout of a figure. Sizes of texts and positions of values are known only afterwards."""
    figure.set_layout_engine("constrained", rect=(0, 0, 1 - right / figure.bbox.width, 1), wspace=between)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def draw_picture(report: ComparisonReport, path: Path) -> None:
    """Write a PNG of the metric over trainable parameters."""
    with style():
        heading = f"{report.task} · {report.data_name} · {report.model_name}"
        figure = trade_off(report, PARAMETERS, PICTURE, heading)
        figure.savefig(path, format="png", dpi=160, bbox_inches="tight", pad_inches=0.15)


@dataclass(frozen=True)
class ChartPoint:
    """The point of one entry in a chart."""

    number: int
    """The number of the entry in the report, from 1 on."""
    entry: ConfigurationTrials
    x: float
    y: float
    seeds: tuple[float, ...]
    best: bool
    """Whether the entry is on the Pareto front: no cheaper entry is better."""
    away: bool = False
    """Whether the score is outside of the chart, so that the point is drawn at the edge."""

    @property
    def reference(self) -> bool:
        return is_reference(self.entry)

    @property
    def colour(self) -> str:
        return LIGHT.red if self.reference else LIGHT.blue if self.best else LIGHT.quiet

    @property
    def ends(self) -> tuple[float, float]:
        """Return the lowest and the highest value that are drawn at this point."""
        error = self.entry.error or 0.0
        heights = (self.y - error, self.y + error, *self.seeds)
        return (self.y, self.y) if self.away else (min(heights), max(heights))


def is_reference(entry: ConfigurationTrials) -> bool:
    return entry.trials[0].method == FULL


def group(number: int) -> str:
    """Return the prefix of the ids of all marks of an entry."""
    return f"entry-{number}"


def points(report: ComparisonReport, cost: Cost) -> list[ChartPoint]:
    """Return the points of all entries whose score is finite."""
    entries = report.entries()
    best = front(entries, report.better, cost.of)
    found = []
    for number, entry in enumerate(entries, 1):
        if math.isfinite(entry.score):
            seeds = tuple(trial.after[report.metric] for trial in entry.trials)
            found.append(ChartPoint(number, entry, cost.of(entry), entry.score, seeds, entry in best))
    return found


def trade_off(report: ComparisonReport, cost: Cost, shape: Shape, heading: str = "") -> Figure:
    """Draw the metric over a cost, with the Pareto front, full fine-tuning and the majority baseline marked.

    Args:
        report: the results to draw.
        cost: the quantity on the horizontal axis.
        shape: the size of the chart.
        heading: the title of a separate picture. With a heading, the picture also explains the marks.
    """
    figure = new_figure(shape)
    axes = figure.add_subplot()
    if heading:
        figure.suptitle(fitted(axes, heading, shape.width - 40), x=0.01, ha="left", fontsize=12, parse_math=False)
        title(axes, "line: Pareto front, bars: one standard error", "right", LIGHT.quiet)
    drawn, beyond = split(report, points(report, cost))
    frame(axes, report, cost, [point.x for point in (*drawn, *beyond)])
    scale(axes, [] if report.greater else [point.y for point in drawn])
    levels = references(report, drawn)
    for y, look in levels:
        axes.axhline(y, zorder=1, **look)
    for point in drawn:
        draw_point(axes, point)
    settle(figure)
    axes.autoscale(False)
    edge = axes.transAxes.transform((0, 0.03 if report.greater else 0.97))
    height = float(axes.transData.inverted().transform(edge)[1])
    for point in (moved := [replace(point, y=height, away=True) for point in beyond]):
        draw_mark(axes, point, "v" if report.greater else "^")
    drawn += moved
    corners = sorted((point.x, point.y) for point in drawn if point.best)
    axes.plot([x for x, _ in corners], [y for _, y in corners], color=LIGHT.blue, linewidth=1.2, zorder=2)
    lines = [corners, *([(x, y) for x in axes.get_xlim()] for y, _ in levels)]
    name_all(axes, report, shape, drawn, lines)
    return figure


def split(report: ComparisonReport, drawn: list[ChartPoint]) -> tuple[list[ChartPoint], list[ChartPoint]]:
    """Return the points in two lists: those to draw at their scores, and a few that are so much worse that all others
    would be squeezed into a line."""
    ranked = sorted(drawn, key=lambda point: point.y, reverse=report.greater)
    for kept in range(len(ranked) - 1, max(2, math.ceil(0.7 * len(ranked)) - 1), -1):
        most, rest = ranked[:kept], ranked[kept:]
        if abs(most[-1].y - rest[0].y) > abs(most[-1].y - most[0].y):
            return most, rest
    return ranked, []


def name_all(axes: Axes, report: ComparisonReport, shape: Shape, drawn: list[ChartPoint], lines: list[Line]) -> None:
    """Write the names of the points. Points on the Pareto front are named first, since they are the most important."""
    marks = [box for point in drawn for box in covered(axes, point)]
    marks += name_floor(axes, report, [point for point in drawn if not point.away], marks)
    ordered = sorted(drawn, key=lambda point: (not point.best, not point.reference))
    wishes = [wish(point, shape) for point in ordered]
    place(axes, wishes, marks, [box for line in lines for box in along(axes, line)])


def frame(axes: Axes, report: ComparisonReport, cost: Cost, costs: list[float]) -> None:
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel(f"{cost.name} (log scale)" if cost.log else cost.name, loc="right")
    title(axes, metric_name(report), colour=LIGHT.quiet)
    axes.xaxis.set_major_formatter(formatter(cost.shown))
    if not cost.log:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        return
    low, high = max(1.0, min(costs, default=1.0)), max(1.0, *costs, 1.0)
    axes.set_xscale("log")
    axes.set_xlim(low / 2.5, high * 2.5)
    subs = (1.0,) if high > 50 * low else (1.0, 2.0, 5.0)
    axes.xaxis.set(major_locator=LogLocator(subs=subs, numticks=7), minor_locator=NullLocator())
    axes.xaxis.set_major_formatter(formatter(cost.shown))


def metric_name(report: ComparisonReport) -> str:
    return f"{report.metric} ({'more' if report.greater else 'less'} is better)"


def title(axes: Axes, text: str, where: Literal["left", "right"] = "left", colour: str = LIGHT.ink) -> None:
    axes.set_title(text, loc=where, fontsize=12, color=colour, parse_math=False)


def scale(axes: Axes, values: Iterable[float]) -> None:
    """Set a logarithmic scale for values that are far apart, such as perplexities before and after training."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and 0 < RANGE * min(finite) < max(finite):
        axes.set_yscale("log")
        subs = (1.0, 2.0, 5.0) if max(finite) < 1000 * min(finite) else (1.0,)
        axes.yaxis.set(major_locator=LogLocator(subs=subs, numticks=8), minor_locator=NullLocator())
        axes.yaxis.set_major_formatter(formatter(short))


def formatter(shown: Callable[[float], str]) -> FuncFormatter:
    return FuncFormatter(lambda value, _: shown(value))


def references(report: ComparisonReport, drawn: list[ChartPoint]) -> list[tuple[float, dict[str, Any]]]:
    """Return the reference scores (full fine-tuning and the majority baseline), with the styles of their lines."""
    found = []
    full = [point.y for point in drawn if point.reference]
    if full:
        best = max(full) if report.greater else min(full)
        found.append((best, {"color": LIGHT.red, "linestyle": (0, (4, 4)), "linewidth": 0.9}))
    if report.floor is not None and has_room(report.floor, drawn):
        found.append((report.floor, {"color": LIGHT.quiet, "linestyle": (0, (1.5, 3)), "linewidth": 1.1}))
    return found


def has_room(floor: float, drawn: list[ChartPoint]) -> bool:
    """Return whether the majority baseline is near enough to the scores to be drawn without squeezing them together."""
    scores = [point.y for point in drawn] or [floor]
    reach = 0.5 * (max(scores) - min(scores))
    return not reach or min(scores) - reach <= floor <= max(scores) + reach


def draw_point(axes: Axes, point: ChartPoint) -> None:
    name = group(point.number)
    if point.entry.error:
        ends = [point.y - point.entry.error, point.y + point.entry.error]
        axes.plot([point.x] * 2, ends, color=point.colour, linewidth=1.2, zorder=3, gid=f"{name}-error")
    if len(point.seeds) > 1:
        many = [point.x] * len(point.seeds)
        axes.plot(many, point.seeds, "_", color=point.colour, markersize=7, zorder=3, gid=f"{name}-seeds")
    draw_mark(axes, point, "s" if point.reference else "o")


def draw_mark(axes: Axes, point: ChartPoint, marker: str) -> None:
    """Draw a point, with an invisible area around it that reacts to the mouse pointer."""
    name = group(point.number)
    fill = point.colour if point.best else LIGHT.surface
    look: dict[str, Any] = {"markerfacecolor": fill, "markeredgecolor": point.colour, "markeredgewidth": 1.6}
    axes.plot(point.x, point.y, marker, markersize=7.5, zorder=4, gid=f"{name}-point", **look)
    axes.plot(point.x, point.y, "o", markersize=20, color=LIGHT.ground, alpha=0, zorder=6, gid=f"{name}-hover")


def covered(axes: Axes, point: ChartPoint) -> list[Box]:
    """Return the boxes in pixels that are covered by a point, and by its error bar and the marks of its seeds."""
    (x, low), (_, high), (_, y) = axes.transData.transform([(point.x, each) for each in (*point.ends, point.y)])
    return [around(x, y, 6), (x - 4, low, x + 4, high)]


def name_floor(axes: Axes, report: ComparisonReport, drawn: list[ChartPoint], marks: list[Box]) -> list[Box]:
    """Write the value of the majority baseline at its line, or at the edge of the chart if the line is outside. Return
    the box of the text."""
    if report.floor is None:
        return []
    text = f"majority baseline {fixed(report.floor, decimals([report.floor]))}"
    inside = axes.get_window_extent()
    if not has_room(report.floor, drawn):
        below = report.floor < min(point.y for point in drawn)
        text += " ↓" if below else " ↑"
    y = float(np.clip(axes.transData.transform((1, report.floor))[1], inside.y0, inside.y1))
    width, height = extent(axes, text)
    spots = [LabelOffset(x, y, far=False) for x in (-4, 4) for y in (9, -9)]
    boxes = [(spot, spot.box(inside.x1 if spot.x < 0 else inside.x0, y, width, height)) for spot in spots]
    fitting = [each for each in boxes if inside.y0 <= each[1][1] and each[1][3] <= inside.y1]
    spot, box = next((each for each in fitting if Taken(marks).free(each[1])), fitting[0])
    axes.annotate(
        text,
        (spot.x < 0, (y - inside.y0) / inside.height),
        xycoords="axes fraction",
        xytext=(spot.x, spot.y),
        textcoords="offset points",
        ha="right" if spot.x < 0 else "left",
        va=spot.vertical,
        color=LIGHT.quiet,
        in_layout=False,
    )
    return [box]


def wish(point: ChartPoint, shape: Shape) -> Wish:
    beside = f" ({fixed(point.entry.score, decimals([point.entry.score]))})" if point.away else ""
    name = point.entry.label
    names = (shorten(name, shape.name), shorten(name, shape.name // 2), str(point.number))
    return Wish(point.x, point.y, tuple(each + beside for each in names), group(point.number), LIGHT.ink)
