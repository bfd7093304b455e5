"""Helpers for printing: a console that never cuts a path, plain tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import to_json
from rich.console import Console
from rich.table import Table

from peftcore.surgery.planning import Plan

WIDTH = 100
"""The width of the output, in characters, if it is not a terminal."""
MANY = 8


def console() -> Console:
    """Return a console for standard output, as wide as the terminal. Text in brackets is printed unchanged and not
    interpreted as markup, since paths and requirements contain brackets."""
    terminal = Console().is_terminal
    return Console(width=None if terminal else WIDTH, markup=False, emoji=False, highlight=False)


def columns(*headings: str, right: frozenset[str] = frozenset(), header: bool = True) -> Table:
    """Return a table without lines; text that does not fit into a cell is wrapped, never cut."""
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
    """Format tensors: ``A 8×768, B 768×8``; scalars have the shape ``1``. If there are many tensors, only the first two
    are listed."""
    named = [f"{name} {times(shape) or '1'}" for name, shape in shapes.items()]
    return ", ".join(named if len(named) <= MANY else [*named[:2], f"... ({len(named)} tensors)"])


def frozen(plan: Plan) -> str:
    """Return text with the number of an adapter's parameters that are frozen; empty if all are trained."""
    return f", {plan.frozen:,} frozen in the adapter" if plan.frozen else ""


def share(part: float) -> str:
    """Format a share: in percent, or in scientific notation if it is below 0.01%."""
    return f"{part:.3%}" if part >= 1e-4 or not part else f"{part:.1e}"


def spelled(value: Any) -> str:
    """Format a value as it is written on a command line."""
    return value if isinstance(value, str) else to_json(value, fallback=repr).decode()
