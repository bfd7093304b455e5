"""The picture of a comparison: accuracy over trainable parameters, one labelled point a method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from peftcore.cli.report import Report, Result

POINT, REFERENCE, QUIET = "#1f5fa8", "#b3541e", "0.45"
PLACES = (
    *((9, 0, "left", "center"), (-9, 0, "right", "center"), (7, 8, "left", "bottom"), (-7, 8, "right", "bottom")),
    *((7, -8, "left", "top"), (-7, -8, "right", "top"), (9, 18, "left", "bottom"), (9, -18, "left", "top")),
)
"""Where a label may stand, best first: offset from its point in points of type, and how it is aligned there."""


def draw_picture(report: Report, path: Path) -> None:
    """Write a PNG. The figure is made without pyplot: neither a display nor global state is touched."""
    figure = Figure(figsize=(8.5, 5.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    draw_frame(axes, report)
    for result in report.results:
        draw_point(axes, result)
    figure.draw_without_rendering()  # settles the layout, without which no text has an extent
    place_labels(axes, report.results)
    figure.savefig(path, format="png")


def draw_frame(axes: Axes, report: Report) -> None:
    counts = [result.trainable for result in report.results]
    axes.set_xscale("log")
    axes.set_xlim(min(counts) / 4, max(counts) * 4)
    axes.margins(y=0.12)
    axes.set_xlabel("trainable parameters (log scale)")
    axes.set_ylabel(f"accuracy on {report.held_out_size:,} held-out texts")
    axes.set_title(
        f"{report.schedule.steps} steps of {report.schedule.batch_size} texts, bars: one standard error",
        loc="left",
        fontsize=10,
        color=QUIET,
    )
    axes.grid(which="major", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(report.majority, color=QUIET, linestyle="--", linewidth=1)
    axes.annotate(
        f"majority class {report.majority:.3f}",
        xy=(1, report.majority),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 4),
        textcoords="offset points",
        ha="right",
        color=QUIET,
        fontsize=9,
    )


def draw_point(axes: Axes, result: Result) -> None:
    axes.errorbar(
        result.trainable,
        result.accuracy_after,
        yerr=result.standard_error,
        fmt="o",
        markersize=6,
        capsize=2.5,
        elinewidth=1,
        color=REFERENCE if result.trainable == result.total else POINT,
    )


def place_labels(axes: Axes, results: tuple[Result, ...]) -> None:
    """Put each name at the first place where it covers no point, no bar and no other name."""
    taken = [mark_extent(axes, result) for result in results]
    for result in results:
        for x, y, horizontal, vertical in PLACES:
            label = axes.annotate(
                result.method,
                (result.trainable, result.accuracy_after),
                xytext=(x, y),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=9.5,
                in_layout=False,
            )
            extent = label.get_window_extent()
            if not any(extent.overlaps(other) for other in taken) or (x, y, horizontal, vertical) == PLACES[-1]:
                taken.append(extent)
                break
            label.remove()


def mark_extent(axes: Axes, result: Result) -> Bbox:
    """What a point and its error bar cover, in pixels."""
    ends = [(result.trainable, result.accuracy_after + sign * result.standard_error) for sign in (-1, 1)]
    (left, low), (right, high) = axes.transData.transform(ends)
    return Bbox.from_extents(left - 9, low, right + 9, high)
