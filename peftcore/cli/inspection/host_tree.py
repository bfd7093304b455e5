"""The work of ``peftcore tree``: shows a model as a tree, with roles and the changes that methods would make. Equal
modules are one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from peftcore.cli.pages import columns, frozen, share, tensors
from peftcore.injection.request import host_map
from peftcore.models.dry_run import PlannedSite, Recorded, RequestedMethod
from peftcore.models.skeletons import Skeleton, skeleton
from peftcore.roles import HostEntry, HostMap
from peftcore.roles.tree import TreeLine, tree_lines

COLOURS = ("green", "magenta", "yellow", "cyan", "blue", "red")
"""Colours of the methods, used in turn."""


@dataclass(frozen=True)
class ModelTree:
    """A model, and for each method the record of its changes."""

    skeleton: Skeleton
    host: HostMap
    methods: tuple[Recorded, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.skeleton.as_dict(),
            "entries": [entry_as_dict(entry) for entry in self.host.entries],
            "methods": [recorded.as_dict() for recorded in self.methods],
            "notes": [*self.skeleton.notes, *(note for recorded in self.methods for note in recorded.notes)],
        }

    def page(self) -> RenderableType:
        """Return the tree as a table. Lines that a method changes have the method's colour."""
        colours = dict(zip((recorded.name for recorded in self.methods), cycle(COLOURS), strict=False))
        table = columns("module", "role", "weight", "")
        for line in tree_lines(self.host, self._marks()):
            table.add_row(*cells(line, colours))
        parts: list[RenderableType] = [self.skeleton.title, "", table]
        parts += [""] if self.methods else []
        parts += [Text(total(recorded), colours[recorded.name]) for recorded in self.methods]
        notes = self.as_dict()["notes"]
        return Group(*parts, *(Text(f"note: {note}", "yellow") for note in notes))

    def _marks(self) -> dict[str, list[str]]:
        marks: dict[str, list[str]] = {}
        for recorded in self.methods:
            for place in recorded.places:
                marks.setdefault(place.path, []).append(mark(recorded.name, place))
        return marks


def shown(source: str, wanted: Sequence[RequestedMethod]) -> ModelTree:
    """Return the tree of a model. Its weights are not loaded.

    Raises:
        BadInput, UnknownMethod, ConfigError, TargetError, UnsupportedSite: the model does not exist, or a method cannot
            act on it.
    """
    for each in wanted:
        each.resolved()  # a wrong name or option is said before anything is built
    built = skeleton(source)
    return ModelTree(built, host_map(built.model), tuple(Recorded.of(each, built.model) for each in wanted))


def entry_as_dict(entry: HostEntry) -> dict[str, Any]:
    layout = None if entry.layout is None else {name: list(rows) for name, rows in entry.layout.parts}
    return {**asdict(entry), "layout": layout}


def mark(method: str, place: PlannedSite) -> str:
    """Return the tensors of a method at a site as text, ``lora A 8×64, B 64×8``; for slices of a fused weight, the text
    also has their role."""
    part = f" [{place.role}]" if place.rows else ""
    return f"{method}{part} {tensors(place.tensors)}"


def cells(line: TreeLine, colours: dict[str, str]) -> tuple[Text, ...]:
    """Return one row of the table."""
    first = colours[line.marks[0].partition(" ")[0]] if line.marks else ""
    changes = [Text(text, colours[text.partition(" ")[0]]) for text in line.marks]
    notes = [Text(line.notes, "dim")] if line.notes else []
    return (
        Text("  " * line.depth + line.name, first),
        Text(line.role, "cyan"),
        Text(line.shape.replace(" x ", "×")),
        Text("\n").join([*notes, *changes]),
    )


def total(recorded: Recorded) -> str:
    plan = recorded.plan
    text = f"{recorded.name}: trainable {plan.trainable:,} of {plan.total:,} ({share(plan.share)}){frozen(plan)}"
    shared = [
        f"{place.name.removeprefix('shared:')}: {tensors(place.tensors)}" for place in recorded.shared if place.tensors
    ]
    return "; ".join([f"{text}, target modules {len(plan.sites)}", *(f"shared {each}" for each in shared)])
