"""Where a method's operators sit, as a picture: a block of a reference model, and in it what the method put there.

Nothing here knows a method: what is drawn is what the surgeon recorded.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from html import escape

from diagram_places import FRAME, Drawn, Key, Mark, drawn
from diagram_rows import Frame, Row, label, rows

WIDTH, LEFT, RIGHT, NOTES = 380, 28, 186, 206
"""Of the picture, and where boxes begin and end and notes begin."""
MIDDLE, BOX, STEP, LINE = (LEFT + RIGHT) / 2, 24, 14, 14
"""Of the boxes; heights of a box, of the way to the next one, of a line of a note."""
LETTERS = 29
"""In a line of a note."""
KINDS = {"trains": "trains", "acts": "acts, with parameters elsewhere or none", "reads": "is read", "": "frozen"}
STYLE = """
.peft-diagram{max-width:34rem;width:100%;height:auto;--on:var(--diagram-accent,var(--md-accent-fg-color,#d2491e))}
.peft-diagram text{font:12px var(--md-text-font-family,system-ui),sans-serif;fill:currentColor}
.peft-diagram .note{font-size:11px}.peft-diagram .name{font-weight:700}
.peft-diagram rect,.peft-diagram circle,.peft-diagram path{fill:none;stroke:currentColor;stroke-opacity:.45}
.peft-diagram rect{fill:currentColor;fill-opacity:.06}.peft-diagram rect.frame{fill:none;stroke-opacity:.25}
.peft-diagram rect.trains{fill:var(--on);fill-opacity:.28;stroke:var(--on);stroke-opacity:1;stroke-width:1.6}
.peft-diagram rect.acts{fill:none;stroke:var(--on);stroke-opacity:1;stroke-width:1.6}
.peft-diagram rect.reads{fill:none;stroke:var(--on);stroke-opacity:1;stroke-dasharray:4 3}
.peft-diagram path.lead{stroke:var(--on);stroke-opacity:.8}
""".replace("\n", "")


def svg(name: str) -> str:
    """A method in the first reference model in which it has a place, as an ``<svg>`` element.

    Args:
        name: of an installed method.

    Raises:
        UnknownMethod: there is none.
        LookupError: no reference model has a place for it.
    """
    found = drawn(name)
    drawing = Drawing(found)
    for each in rows(found):
        drawing.frame(each) if isinstance(each, Frame) else drawing.row(each)
    drawing.beside(found.shared)
    drawing.legend()
    title, identity = f"Where {name} acts in {found.host}", name.replace("/", "-")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="peft-diagram" viewBox="0 0 {WIDTH} {drawing.y:g}" role="img" '
        f'aria-labelledby="{identity}-title {identity}-desc"><title id="{identity}-title">{escape(title)}</title>'
        f'<desc id="{identity}-desc">{escape(described(found))}</desc><style>{STYLE}</style>'
        f"{''.join(drawing.parts)}</svg>"
    )


def described(found: Drawn) -> str:
    """The picture in words."""
    texts = []
    for mark in (*found.marks, *found.shared):
        names = ", ".join(
            dict.fromkeys(label(key) for key in sorted(mark.keys, key=lambda key: (key.role, key.number)))
        )
        if mark.kind == "reads":
            texts.append(f"Reads: {names}.")
        else:
            texts.append(
                f"{names + ': ' if names else ''}{mark.name}, {mark.act}, {', '.join(mark.shapes)}".rstrip(", ") + "."
            )
    return " ".join(texts)


class Drawing:
    """What is drawn so far, from top to bottom."""

    def __init__(self, found: Drawn) -> None:
        self.found = found
        self.parts = [f'<text x="{LEFT - 20}" y="14" class="name">{escape(found.host)}</text>']
        self.y = 24.0
        self.before: float | None = None
        """Where the last box ended, and an arrow begins."""
        self.start = 0.0
        """Where the branch began."""
        self.told: set[Mark] = set()

    def frame(self, frame: Frame) -> None:
        """A block."""
        if self.before is not None:
            self.arrow(self.before)
        top, place = self.y, len(self.parts)
        self.before = top + 19  # below the title
        self.y += 32
        if frame.changed:
            self.notes([mark for mark in self.found.marks if Key(FRAME) in mark.keys], [], top + 6)
        for row in frame.rows:
            self.row(row)
        self.y += 2
        kind = self.kind_of(Key(FRAME)) if frame.changed else ""
        role = ' data-role="block"' if frame.changed else ""
        shape = f'x="8" y="{top:g}" width="{RIGHT + 2}" height="{self.y - top - 6:g}" rx="8"'
        fill = ' style="fill-opacity:.08"' if kind else ""
        self.parts.insert(place, f'<rect class="frame {kind}"{role} {shape}{fill}/>')
        self.parts.insert(place + 1, f'<text x="16" y="{top + 14:g}" class="note">{escape(frame.title)}</text>')
        self.y += 6

    def row(self, row: Row) -> None:
        """Boxes side by side, what is told of them, and the way that led to them."""
        if self.before is not None:
            self.arrow(self.before)
        if row.begins:
            self.start = self.y - STEP / 2 + 1
        marks = [mark for mark in self.found.marks if mark.keys.intersection(row.boxes)]
        top, width = self.y, (RIGHT - LEFT + 6) / len(row.boxes)
        for i, key in enumerate(row.boxes):
            self.box(key, LEFT + i * width, width - 6)
        self.before = self.y = top + BOX
        if row.joins:
            self.join()
        self.y = max(self.y + STEP, self.notes(marks, row.boxes, top) + 6)

    def arrow(self, start: float) -> None:
        self.parts.append(f'<path d="M{MIDDLE:g} {start:g}V{self.y:g}m-3 -4 3 4 3 -4"/>')

    def box(self, key: Key, x: float, width: float) -> None:
        text = label(key)
        role = f'data-role="{escape(key.path or key.role)}"'
        size = f"font-size:{min(12, 1.75 * width / len(text)):.3g}px"
        self.parts.append(
            f'<rect class="{self.kind_of(key)}" {role} x="{x:g}" y="{self.y:g}" width="{width:g}" height="{BOX}" '
            f'rx="4"/><text x="{x + width / 2:g}" y="{self.y + 16:g}" text-anchor="middle" style="{size}">'
            f"{escape(text)}</text>"
        )

    def kind_of(self, key: Key) -> str:
        """The strongest thing that is done at a box."""
        kinds = {mark.kind for mark in self.found.marks if key in mark.keys}
        return next((kind for kind in KINDS if kind in kinds), "")

    def join(self) -> None:
        """The branch is added to what went past it."""
        y = self.y + STEP + 4
        self.parts.append(
            f'<path d="M{MIDDLE:g} {self.y:g}V{y - 8:g}M{MIDDLE:g} {self.start:g}H18V{y:g}H{MIDDLE - 8:g}"/>'
            f'<circle cx="{MIDDLE:g}" cy="{y:g}" r="8"/><path d="M{MIDDLE - 4:g} {y:g}h8M{MIDDLE:g} {y - 4:g}v8"/>'
        )
        self.before = self.y = y + 8

    def notes(self, marks: Sequence[Mark], boxes: Sequence[Key], top: float) -> float:
        """What is told of marks, beside their row; in full where they come first. Returns where it ends."""
        y = top + 10
        for mark in (mark for mark in marks if mark.kind != "reads"):
            here = [label(key) for key in boxes if key in mark.keys]
            some = f" at {', '.join(here)}" if here and len(here) < len(boxes) else ""
            self.parts.append(f'<path class="lead" d="M{RIGHT + 2} {y - 4:g}H{NOTES - 4}"/>')
            for i, line in enumerate([*wrapped(mark.name + some), *(() if mark in self.told else details(mark))]):
                style = "note name" if i < len(wrapped(mark.name + some)) else "note"
                self.parts.append(f'<text x="{NOTES}" y="{y:g}" class="{style}">{escape(line)}</text>')
                y += LINE
            self.told.add(mark)
            y += 4
        return y - LINE

    def beside(self, shared: Sequence[Mark]) -> None:
        """What belongs to the method alone."""
        for mark in shared:
            self.y += 4
            number = f" × {mark.sizes}" if mark.sizes > 1 else ""
            self.parts.append(
                f'<rect class="{mark.kind}" data-role="shared" x="{LEFT}" y="{self.y:g}" width="{RIGHT - LEFT}" '
                f'height="{BOX}" rx="4"/><text x="{MIDDLE:g}" y="{self.y + 16:g}" text-anchor="middle">'
                f"{escape(mark.name + number)}</text>"
            )
            y = self.y + 10
            for line in details(mark, shared=True):
                self.parts.append(f'<text x="{NOTES}" y="{y:g}" class="note">{escape(line)}</text>')
                y += LINE
            self.y = max(self.y + BOX + 6, y - 4)

    def legend(self) -> None:
        """What the colours mean, of those that are there."""
        kinds = {mark.kind for mark in (*self.found.marks, *self.found.shared)} | {""}
        self.y += 8
        for kind, words in KINDS.items():
            if kind in kinds:
                self.parts.append(
                    f'<rect class="{kind}" x="{LEFT}" y="{self.y:g}" width="18" height="12" rx="3"/>'
                    f'<text x="{LEFT + 26}" y="{self.y + 10:g}" class="note">{words}</text>'
                )
                self.y += 18
        self.y += 2


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, LETTERS)


def details(mark: Mark, shared: bool = False) -> Iterator[str]:
    """How it acts, and the shapes of what trains; of many the first."""
    yield from wrapped(mark.act)
    shown = mark.shapes[:4]
    more = [f"and {len(mark.shapes) - 4} more"] if len(mark.shapes) > 4 else []
    yield from wrapped(", ".join([*shown, *more]).replace(" ", "\u00a0").replace(",\u00a0", ", "))
    if mark.sizes > 1 and not shared:
        yield f"elsewhere {mark.sizes - 1} other size{'s' if mark.sizes > 2 else ''}"
