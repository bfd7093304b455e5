"""Places names next to the points of a chart, so that a name does not cover a point, a line or another name."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text

NEAR = ((9, 0), (-9, 0), (7, 8), (-7, 8), (7, -8), (-7, -8), (0, 10), (0, -10))
"""Positions of a name, best first: offset from its point in points of type."""
RINGS = (22, 36, 52, 70, 90, 115)
"""Further distances of a name from its point, used if all near positions are occupied. A thin line connects the name
with its point."""
DIRECTIONS = 16
START = 7
"""The distance from a point at which the line to its name begins."""
GAP = 1.5

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


@dataclass(frozen=True)
class Wish:
    """A point that needs a name in the chart."""

    x: float
    y: float
    names: tuple[str, ...]
    """The name to write, followed by shorter names for the case that there is not enough room."""
    group: str
    """The group of drawn elements to which the name belongs."""
    colour: str


@dataclass(frozen=True)
class LabelOffset:
    """The offset of a text from its point, which also determines the text's alignment."""

    x: float
    y: float
    far: bool

    @property
    def horizontal(self) -> str:
        steep = abs(self.x) < 0.3 * math.hypot(self.x, self.y)
        return "center" if steep else ("left" if self.x > 0 else "right")

    @property
    def vertical(self) -> str:
        flat = abs(self.y) < 0.3 * math.hypot(self.x, self.y)
        return "center" if flat else ("bottom" if self.y > 0 else "top")

    def box(self, x: float, y: float, width: float, height: float) -> Box:
        left = x + self.x - {"left": 0.0, "center": width / 2, "right": width}[self.horizontal]
        bottom = y + self.y - {"bottom": 0.0, "center": height / 2, "top": height}[self.vertical]
        return left - GAP, bottom - GAP, left + width + GAP, bottom + height + GAP


class Taken:
    """The boxes that are already occupied."""

    def __init__(self, boxes: Iterable[Box]) -> None:
        self._boxes = np.array(list(boxes), dtype=float).reshape(-1, 4)

    def add(self, boxes: Sequence[Box]) -> None:
        self._boxes = np.concatenate([self._boxes, np.array(boxes, dtype=float).reshape(-1, 4)])

    def free(self, box: Box) -> bool:
        left, bottom, right, top = self._boxes.T
        apart = (left >= box[2]) | (right <= box[0]) | (bottom >= box[3]) | (top <= box[1])
        return bool(apart.all())


def place(axes: Axes, wishes: Iterable[Wish], marks: Sequence[Box], lines: Sequence[Box]) -> None:
    """Write the names of points, in the order of `wishes`. A name may cover ``lines`` if all other room is occupied.

    A name without free room is left out. The axes and the figure must not change their size afterwards.
    """
    firm = Taken(marks)
    all_of_it = Taken([*marks, *lines])
    for wish in wishes:
        found = _first_free(axes, wish, (all_of_it, firm))
        if found is None:
            continue
        text, spot, boxes = found
        _write(axes, wish, text, spot)
        firm.add(boxes)
        all_of_it.add(boxes)


def _first_free(axes: Axes, wish: Wish, layers: Sequence[Taken]) -> tuple[str, LabelOffset, list[Box]] | None:
    x, y = axes.transData.transform((wish.x, wish.y))
    for name in wish.names:
        width, height = extent(axes, name)
        for taken in layers:
            for spot in _places():
                box = spot.box(x, y, width, height)
                leader = _leader(x, y, spot) if spot.far else []
                if _inside(axes, box) and taken.free(box) and all(taken.free(each) for each in leader):
                    return name, spot, [box, *leader]
    return None


def _places() -> Iterator[LabelOffset]:
    for x, y in NEAR:
        yield LabelOffset(x, y, far=False)
    for radius in RINGS:
        for turn in range(DIRECTIONS):
            angle = 2 * math.pi * turn / DIRECTIONS
            yield LabelOffset(radius * math.cos(angle), radius * math.sin(angle), far=True)


def _leader(x: float, y: float, spot: LabelOffset) -> list[Box]:
    """Return boxes over the line from a point to its name, except the part next to the point."""
    length = math.hypot(spot.x, spot.y)
    return [
        around(x + spot.x * along / length, y + spot.y * along / length, 1)
        for along in np.arange(START + 3, length - GAP - 1, 3.0)
    ]


def _inside(axes: Axes, box: Box) -> bool:
    """Return whether a box is in the area where names are allowed: inside the axes, or to the right of them, up to the
    edge of the figure."""
    within = axes.get_window_extent()
    right = axes.figure.bbox.width - 2
    return box[0] >= within.x0 and box[1] >= within.y0 and box[2] <= right and box[3] <= within.y1 + 2


def _write(axes: Axes, wish: Wish, text: str, spot: LabelOffset) -> None:
    note = axes.annotate(
        text,
        (wish.x, wish.y),
        xytext=(spot.x, spot.y),
        textcoords="offset points",
        ha=spot.horizontal,
        va=spot.vertical,
        color=wish.colour,
        in_layout=False,
        parse_math=False,
        zorder=5,
    )
    note.set_gid(f"{wish.group}-name")
    if spot.far:
        center = axes.transData.transform((wish.x, wish.y))
        length = math.hypot(spot.x, spot.y)
        way = np.array((spot.x, spot.y)) * [[START / length], [1 - 2 * GAP / length]]
        ends = axes.transData.inverted().transform(center + way)
        axes.plot(*ends.T, color=wish.colour, linewidth=0.7, clip_on=False, zorder=5, gid=f"{wish.group}-leader")


def extent(axes: Axes, text: str) -> tuple[float, float]:
    """Return width and height of a text in pixels."""
    probe = Text(0, 0, text, figure=axes.figure, parse_math=False)
    box = probe.get_window_extent()
    return box.width, box.height


def around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def along(axes: Axes, points: Sequence[tuple[float, float]]) -> list[Box]:
    """Return small boxes that cover a line through the given points of the data."""
    if len(points) < 2:
        return []
    ends = axes.transData.transform(points)
    boxes = []
    for (x, y), (to_x, to_y) in pairwise(ends):
        steps = max(2, int(math.hypot(to_x - x, to_y - y) / 4))
        boxes += [around(x + (to_x - x) * s / steps, y + (to_y - y) * s / steps, 1) for s in range(steps + 1)]
    return boxes


def plain(name: str) -> str:
    """Return a name on one line, of printable characters only."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())


def shorten(name: str, length: int) -> str:
    """Return a name without its middle if it is too long, since names of variants often differ at their ends."""
    name = plain(name)
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head].rstrip()}…{name[len(name) - (length - 1 - head) :].lstrip()}"


def fitted(axes: Axes, name: str, room: float) -> str:
    """Return a name, shortened so that its width is at most `room` pixels."""
    lengths = range(2, len(name) + 1)
    fitting = bisect_right(lengths, room, key=lambda length: extent(axes, shorten(name, length))[0])
    return shorten(name, fitting + 1)


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return the heights, moved as little as necessary so that they differ by at least ``gap`` and are between two
    bounds."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved = list(heights)
    floor = low
    for index in order:
        moved[index] = floor = max(moved[index], floor)
        floor += gap
    ceiling = high
    for index in reversed(order):
        moved[index] = ceiling = min(moved[index], ceiling)
        ceiling -= gap
    return moved
