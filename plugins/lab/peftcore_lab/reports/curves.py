"""Charts of scores and losses over steps. A few configurations share one chart; many configurations have separate
charts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peftcore.utils.numbers import decimals, fixed
from peftcore_lab.reports.labels import extent, fitted, shorten, spread
from peftcore_lab.reports.plots import LIGHT, Shape, group, is_reference, new_figure, scale, settle, title
from peftcore_lab.reports.trials import ComparisonReport, ConfigurationTrials, Trial

COLOURS = (LIGHT.blue, LIGHT.amber, LIGHT.green, LIGHT.purple, LIGHT.sky, LIGHT.ink)
"""Colours of the lines in one chart. Their number is the largest number of lines in a chart. Full fine-tuning is red,
as in all charts."""
LINE = 15
"""The smallest vertical distance between two names."""
PANEL = 118
"""The height of a chart of a single configuration."""

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """The curve of one configuration, over the steps that all its seeds have."""

    number: int
    entry: ConfigurationTrials
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    result: float
    """The number that is shown next to the curve."""

    @property
    def group(self) -> str:
        return group(self.number)


def scores(report: ComparisonReport) -> list[Curve]:
    """Return the metric over steps, beginning with the score before training."""

    def points(trial: Trial) -> Points:
        return [(0, trial.before[report.metric]), *(point for point in trial.curve if point[0] > 0)]

    return [replace(curve, result=curve.entry.score) for curve in _curves(report, points)]


def losses(report: ComparisonReport) -> list[Curve]:
    """Return the training loss over steps."""
    return _curves(report, lambda trial: trial.losses)


def _curves(report: ComparisonReport, points: Callable[[Trial], Points]) -> list[Curve]:
    """Return the curves of all entries. A curve ends where the first of its seeds stopped, since from there on the mean
    would be over fewer seeds."""
    found = []
    for number, entry in enumerate(report.entries(), 1):
        seeds = [dict(points(trial)) for trial in entry.trials]
        steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
        columns = [[seed[step] for seed in seeds] for step in steps]
        finite = [(step, c) for step, c in zip(steps, columns, strict=True) if all(map(math.isfinite, c))]
        if finite:
            mean = tuple(statistics.mean(column) for _, column in finite)
            low, high = (tuple(end(column) for _, column in finite) for end in (min, max))
            found.append(Curve(number, entry, tuple(step for step, _ in finite), mean, low, high, mean[-1]))
    return found


def draw(curves: list[Curve], name: str, ratios: bool, shape: Shape) -> Figure:
    """Draw all curves in one chart, or each in a separate chart. With ``ratios``, values that are far apart have a
    logarithmic scale."""
    return together(curves, name, ratios, shape) if fit(curves) else apart(curves, ratios, shape)


def caption(curves: list[Curve]) -> str:
    """Return a caption that explains the chart."""
    seeds = any(len(curve.entry.trials) > 1 for curve in curves)
    told = ["Mean over seeds; the band goes from the lowest to the highest."] if seeds else []
    if not fit(curves):
        told.append("In grey, the range of all configurations; beside each name, where it ended.")
    return " ".join(told)


def fit(curves: list[Curve]) -> bool:
    """Return whether there are few enough curves for one chart."""
    return sum(not is_reference(curve.entry) for curve in curves) <= len(COLOURS)


def together(curves: list[Curve], name: str, ratios: bool, shape: Shape) -> Figure:
    """Draw all curves in one chart, with names at the ends of the lines."""
    figure = new_figure(shape)
    axes = figure.add_subplot()
    title(axes, name, colour=LIGHT.quiet)
    axes.set_xlabel("steps", loc="right")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
    scale(axes, values(curves) if ratios else [])
    rest = iter(COLOURS)
    colours = [LIGHT.red if is_reference(curve.entry) else next(rest, LIGHT.ink) for curve in curves]
    for curve, colour in zip(curves, colours, strict=True):
        draw_line(axes, curve, colour)
        axes.plot(curve.steps[-1], curve.mean[-1], "o", markersize=5, color=colour, zorder=4, gid=f"{curve.group}-end")
    names = [shorten(curve.entry.label, shape.name) for curve in curves]
    settle(figure, right=max(extent(axes, each)[0] for each in names) + 22)
    name_ends(axes, curves, names, colours)
    return figure


def values(curves: list[Curve]) -> list[float]:
    return [value for curve in curves for value in curve.mean]


def draw_line(axes: Axes, curve: Curve, colour: str) -> None:
    if len(curve.entry.trials) > 1:
        band: dict[str, Any] = {"color": colour, "alpha": 0.18, "linewidth": 0, "zorder": 2}
        axes.fill_between(curve.steps, curve.low, curve.high, gid=f"{curve.group}-band", **band)
    axes.plot(curve.steps, curve.mean, color=colour, linewidth=1.8, zorder=3, gid=f"{curve.group}-line")


def name_ends(axes: Axes, curves: list[Curve], names: list[str], colours: list[str]) -> None:
    """Write the names to the right of the axes, in the order of the curves' ends, with a line from each end to its
    name."""
    box = axes.get_window_extent()
    ends = [axes.transData.transform((curve.steps[-1], curve.mean[-1])) for curve in curves]
    heights = spread([end[1] for end in ends], LINE, box.y0 + LINE / 2, box.y1)
    back = axes.transData.inverted()
    axes.autoscale(False)
    for curve, text, colour, end, height in zip(curves, names, colours, ends, heights, strict=True):
        corners = [(end[0], end[1]), (box.x1, end[1]), (box.x1 + 12, height), (box.x1 + 16, height)]
        way = back.transform(corners)
        axes.plot(way[:, 0], way[:, 1], color=colour, linewidth=0.9, clip_on=False, gid=f"{curve.group}-leader")
        axes.text(way[-1, 0], way[-1, 1], f" {text}", va="center", parse_math=False, gid=f"{curve.group}-name")


def apart(curves: list[Curve], ratios: bool, shape: Shape) -> Figure:
    """Draw a separate chart for each curve, on the same scales, in front of the range of all curves."""
    across = columns(len(curves), shape)
    rows = math.ceil(len(curves) / across)
    figure = new_figure(Shape(shape.width, rows * PANEL + 24, shape.name))
    panels = list(figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).flat)
    scale(panels[0], values(curves) if ratios else [])
    around = whole_range(curves)
    places = decimals(curve.result for curve in curves)
    for index, (axes, curve) in enumerate(zip(panels, curves, strict=False)):
        axes.fill_between(*around, color=LIGHT.grid, linewidth=0, zorder=0)
        draw_line(axes, curve, LIGHT.red if is_reference(curve.entry) else LIGHT.blue)
        title(axes, fixed(curve.result, places), "right", LIGHT.quiet)
        axes.tick_params(labelbottom=index + across >= len(curves))
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=(1, 2, 5, 10)))
    for axes in panels[len(curves) :]:
        axes.remove()
    settle(figure, between=0.05)
    for axes, curve in zip(panels, curves, strict=False):
        beside = extent(axes, f"  {fixed(curve.result, places)}")[0]
        title(axes, fitted(axes, curve.entry.label, axes.get_window_extent().width - beside))
    return figure


def columns(count: int, shape: Shape) -> int:
    """Return the number of charts in a row. It leaves the fewest gaps in the last row, among those numbers for which
    charts are neither too narrow nor too wide."""
    return min(range(shape.width // 165, shape.width // 230, -1), key=lambda across: -count % across)


def whole_range(curves: list[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Return the steps, and the lowest and highest mean of all curves at each step."""
    steps = sorted({step for curve in curves for step in curve.steps})
    heights = [np.interp(steps, curve.steps, curve.mean, left=math.nan, right=math.nan) for curve in curves]
    return steps, list(np.nanmin(heights, axis=0)), list(np.nanmax(heights, axis=0))
