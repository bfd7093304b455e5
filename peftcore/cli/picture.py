"""The picture of a comparison: score over trainable parameters, one labelled point a configuration."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from peftcore.cli.report import title
from peftcore.cli.trials import Entry, Report

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
    entries = report.entries()
    draw_frame(axes, report, entries)
    for entry in entries:
        draw_point(axes, entry)
    figure.draw_without_rendering()  # settles the layout, without which no text has an extent
    place_labels(axes, entries)
    figure.savefig(path, format="png")


def draw_frame(axes: Axes, report: Report, entries: list[Entry]) -> None:
    counts = [entry.trainable for entry in entries]
    axes.set_xscale("log")
    axes.set_xlim(min(counts) / 4, max(counts) * 4)
    axes.margins(y=0.12)
    axes.set_xlabel("trainable parameters (log scale)")
    axes.set_ylabel(report.metric)
    axes.set_title(f"{title(report)}, bars: one standard error", loc="left", fontsize=10, color=QUIET)
    axes.grid(which="major", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if report.floor is not None:
        axes.axhline(report.floor, color=QUIET, linestyle="--", linewidth=1)
        axes.annotate(
            f"majority class {report.floor:.3f}",
            xy=(1, report.floor),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 4),
            textcoords="offset points",
            ha="right",
            color=QUIET,
            fontsize=9,
        )


def draw_point(axes: Axes, entry: Entry) -> None:
    axes.errorbar(
        entry.trainable,
        entry.score,
        yerr=entry.error,
        fmt="o",
        markersize=6,
        capsize=2.5,
        elinewidth=1,
        color=REFERENCE if entry.trainable == entry.trials[0].total else POINT,
    )


def place_labels(axes: Axes, entries: list[Entry]) -> None:
    """Put each name at the first place where it covers no point, no bar and no other name."""
    taken = [mark_extent(axes, entry) for entry in entries]
    for entry in entries:
        for x, y, horizontal, vertical in PLACES:
            label = axes.annotate(
                entry.label,
                (entry.trainable, entry.score),
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


def mark_extent(axes: Axes, entry: Entry) -> Bbox:
    """What a point and its error bar cover, in pixels."""
    ends = [(entry.trainable, entry.score + sign * (entry.error or 0)) for sign in (-1, 1)]
    (left, low), (right, high) = axes.transData.transform(ends)
    return Bbox.from_extents(left - 9, low, right + 9, high)
