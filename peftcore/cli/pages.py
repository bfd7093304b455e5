"""Helpers of the commands that look: a console that never cuts a path, plain tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import to_json
from rich.console import Console
from rich.table import Table

from peftcore.surgery.planning import Plan

WIDTH = 100
"""Columns where the width is unknown: in a pipe, in a file."""
MANY = 8


def console() -> Console:
    """Return standard output as a console, as wide as the terminal is. Brackets are brackets: paths and requirements
    have some."""
    terminal = Console().is_terminal
    return Console(width=None if terminal else WIDTH, markup=False, emoji=False, highlight=False)


def columns(*headings: str, right: frozenset[str] = frozenset(), header: bool = True) -> Table:
    """Return a table without lines; cells that do not fit are folded, never cut."""
    table = Table(box=None, show_header=header, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table


def as_json(document: Any) -> str:
    """Return a document as JSON, for scripts."""
    return json.dumps(document, indent=2)


def times(shape: Sequence[int]) -> str:
    """Format a shape: ``768×3072``."""
    return "×".join(map(str, shape))


def tensors(shapes: Mapping[str, Sequence[int]]) -> str:
    """Format tensors: ``A 8×768, B 768×8``; a single number is shown without a shape, and of very many tensors only the
    first are named."""
    named = [f"{name} {times(shape) or '1'}" for name, shape in shapes.items()]
    return ", ".join(named if len(named) <= MANY else [*named[:2], f"... ({len(named)} tensors)"])


def frozen(plan: Plan) -> str:
    """Tell how many parameters of an adapter would not train; nothing where all of them would."""
    return f", {plan.frozen:,} frozen in the adapter" if plan.frozen else ""


def share(part: float) -> str:
    """Format a part of the whole: in percent, or, where that would be mostly zeros, as a power of ten."""
    return f"{part:.3%}" if part >= 1e-4 or not part else f"{part:.1e}"


def spelled(value: Any) -> str:
    """Format a value as it is written on a command line."""
    return value if isinstance(value, str) else to_json(value, fallback=repr).decode()
