"""The host map as text: repeated modules are folded, so that a model of any depth fits on a page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from peftcore.roles.entries import HostEntry, Layout
from peftcore.roles.vocabulary import OTHER

if TYPE_CHECKING:
    from peftcore.roles.hostmap import HostMap

_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(slots=True)
class Branch:
    """A node of the tree: one component of paths, the entries whose path ends with it, and the child components."""

    entries: list[HostEntry] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    children: dict[str, Branch] = field(default_factory=dict)
    tower: str = ""
    """The note at a tower's root: ``vision tower``."""

    @property
    def bare(self) -> bool:
        """Whether it has neither entries nor notes."""
        return not self.entries and not self.marks and not self.tower


@dataclass(frozen=True, slots=True)
class TreeLine:
    """One line of the tree, for one module or for several equal modules."""

    depth: int
    name: str
    role: str
    shape: str
    notes: str
    marks: tuple[str, ...] = ()
    """Additional texts for the line."""


def render(host: HostMap) -> str:
    found = tree_lines(host)
    names = max((2 * line.depth + len(line.name) for line in found), default=0)
    roles = max((len(line.role) for line in found), default=0)
    shapes = max((len(line.shape) for line in found), default=0)
    return "\n".join(
        f"{'  ' * line.depth + line.name:<{names}}  {line.role:<{roles}}  {line.shape:<{shapes}}  {line.notes}".rstrip()
        for line in found
    )


def tree_lines(host: HostMap, marks: Mapping[str, Sequence[str]] = MappingProxyType({})) -> list[TreeLine]:
    """Returns the map's lines from top to bottom. `marks` are additional texts by path. Modules with different texts do
    not share a line, and a path with a text gets a line even if it does not have a role."""
    root = Branch()
    for entry in host.entries:
        if entry.role != OTHER or entry.path in marks:
            descend(root, entry.path).entries.append(entry)
    for path, texts in marks.items():
        descend(root, path).marks.extend(texts)
    senses = {tower: f"{sense} tower" for sense, towers in host.named_towers.items() for tower in towers}
    for tower in {entry.tower for entry in host.entries if entry.tower}:
        descend(root, tower).tower = senses.get(tower, "tower")
    return [*([] if root.bare else own_lines(root, "(root)", 0)), *below(root, 0)]


def descend(root: Branch, path: str) -> Branch:
    branch = root
    for component in path.split(".") if path else []:
        branch = branch.children.setdefault(component, Branch())
    return branch


def below(branch: Branch, depth: int) -> list[TreeLine]:
    """Returns the lines of all children. Numbered children with equal lines share them: `[0-11]`, `[0,2,4-6]`."""
    alike: dict[tuple[str, tuple[TreeLine, ...]], list[str]] = {}
    for name, child in branch.children.items():
        prefix, number = split(name)
        lines = tuple(lines_of(child, "", depth))
        alike.setdefault((prefix if number else name, lines), []).append(number)
    return [
        replace(line, name=label(prefix, numbers) + line.name) if line.depth == depth else line
        for (prefix, lines), numbers in alike.items()
        for line in lines
    ]


def lines_of(branch: Branch, name: str, depth: int) -> list[TreeLine]:
    """Returns the lines of a branch. A branch without a role and with a single line below it joins its name with that
    line's name: `layers.[0-11]`."""
    if branch.bare:
        lines = below(branch, depth)
        if sum(line.depth == depth for line in lines) == 1:
            return [replace(line, name=f"{name}.{line.name}") if line.depth == depth else line for line in lines]
    return [*own_lines(branch, name, depth), *below(branch, depth + 1)]


def own_lines(branch: Branch, name: str, depth: int) -> Iterator[TreeLine]:
    roles = " + ".join(entry.role for entry in branch.entries if entry.role != OTHER)
    if branch.tower:
        roles = f"{branch.tower} + {roles}" if roles else branch.tower
    shape = next((" x ".join(map(str, entry.shape)) for entry in branch.entries if entry.shape), "")
    notes = "; ".join(note for entry in branch.entries for note in notes_of(entry))
    yield TreeLine(depth, name, roles, shape, notes, tuple(branch.marks))


def notes_of(entry: HostEntry) -> Iterator[str]:
    if entry.layout is not None:
        yield describe(entry.layout)
    if entry.stream != "main":
        yield f"{entry.stream} stream"
    if not entry.called:
        yield "read, not called"


def describe(layout: Layout) -> str:
    """Returns a layout as text: `[q 64 | k 16 | v 16]`, or `4 x [q 12 | k 12 | v 12]`."""
    parts = sorted(layout.parts, key=lambda part: part[1][0])
    groups = len(parts[0][1])
    text = " | ".join(f"{name} {ranges[0][1] - ranges[0][0]}" for name, ranges in parts)
    return f"[{text}]" if groups == 1 else f"{groups} x [{text}]"


def split(name: str) -> tuple[str, str]:
    match = _NUMBERED.fullmatch(name)
    return (match[1], match[2]) if match else (name, "")


def label(prefix: str, numbers: list[str]) -> str:
    if not numbers[0]:
        return prefix
    if len(numbers) == 1:
        return prefix + numbers[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return f"{prefix}[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)}]"
