"""The report of an injection's routers, as `Injection.report` returns it: a table, JSON, a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peftcore.errors import ExportError, NoRouters
from peftcore.forward.context.routers import Ledger, Router, Routes

COLUMNS = ("router", "routes", "choices", "padding", "balance", "entropy", "dropped", "shares")


@dataclass(frozen=True)
class RouterRow:
    """The figures of one router.

    Attributes:
        path: the path of its operator.
        routes: the unit that is routed: a token, a sequence or a task.
        choices: the number of routing decisions that counted, one for each token, sequence or task.
        padding: how many decisions were left out because they belong to padding; None if padding was unknown, so that
            all decisions counted.
        shares: the mean share of each expert. The shares of one choice are the absolute gates, scaled to a sum of one.
        loads: for each expert, the fraction of choices in which its gate is not zero; 1 if gates are soft.
        balance: the entropy of `shares`, from 0 (one expert has all) to 1 (all have the same).
        entropy: the mean entropy of the gates of one choice: near 0 if each choice uses one expert, 1 if it uses all
            experts equally.
        dropped: how many choices had no expert.
    """

    path: str
    routes: Routes
    choices: int
    padding: int | None
    shares: tuple[float, ...]
    loads: tuple[float, ...]
    balance: float
    entropy: float
    dropped: int


@dataclass(frozen=True)
class RouterReport:
    """The routers of an injection, one row each; it prints as a table."""

    name: str
    """The injection's name."""
    method: str
    """The method's name."""
    routers: tuple[RouterRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers as JSON types."""
        return {"name": self.name, "method": self.method, "routers": [asdict(row) for row in self.routers]}

    def json(self) -> str:
        """Returns all numbers as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [COLUMNS, *map(_cells, self.routers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.name} ({self.method}): {len(self.routers)} routers", *lines])

    def __rich__(self) -> Any:
        """Returns the table for a console of rich."""
        from rich.table import Table

        table = Table(title=f"{self.name} ({self.method})")
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for row in self.routers:
            table.add_row(*_cells(row))
        return table

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the mean share of each expert at each router into a file; the file's suffix determines the format.

        Raises:
            ExportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ExportError("plot needs matplotlib: pip install matplotlib") from error
        experts = max(len(row.shares) for row in self.routers)
        shares = [[*row.shares, *[math.nan] * (experts - len(row.shares))] for row in self.routers]
        figure = Figure(figsize=(4 + 0.4 * experts, 1.5 + 0.25 * len(shares)), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0)
        axes.set(title=f"{self.name} ({self.method})", xlabel="expert", xticks=range(experts))
        axes.set_yticks(range(len(shares)), [row.path for row in self.routers], fontsize=7)
        figure.colorbar(picture, ax=axes, label="mean share")
        figure.savefig(path)


def routers_of(name: str, operators: Mapping[str, Any]) -> dict[str, Router]:
    """Returns the routers among operators, by path.

    Raises:
        NoRouters: none of the operators is a router.
    """
    found = {path: each for path, each in operators.items() if isinstance(each, Router)}
    if not found:
        raise NoRouters(f"{name!r} has no routers: none of its operators distributes tokens over experts")
    return found


def report(name: str, method: str, routers: Mapping[str, Router], ledgers: Mapping[str, Ledger]) -> RouterReport:
    """Returns the report of these routers, from the sums recorded in their ledgers. A router that did not run has zero
    choices."""
    rows = tuple(_row(path, routers[path].routes, ledger) for path, ledger in ledgers.items() if path in routers)
    return RouterReport(name, method, rows)


def _row(path: str, routes: Routes, ledger: Ledger) -> RouterRow:
    sums = ledger.sums
    if not sums:
        return RouterRow(path, routes, 0, 0, (), (), 0.0, 0.0, 0)
    *each, entropy, dropped, choices, padding = sums
    experts, made = len(each) // 2, max(choices, 1.0)
    shares, loads = ([value / made for value in part] for part in (each[:experts], each[experts:]))
    whole = sum(shares) or 1.0
    balance = -sum(p / whole * math.log(p / whole) for p in shares if p > 0) / math.log(max(experts, 2))
    return RouterRow(
        path=path,
        routes=routes,
        choices=round(choices),
        padding=round(padding) if ledger.known else None,
        shares=tuple(shares),
        loads=tuple(loads),
        balance=balance,
        entropy=entropy / max(choices - dropped, 1.0),
        dropped=round(dropped),
    )


def _cells(row: RouterRow) -> tuple[str, ...]:
    shares = " ".join(f"{share:.2f}" for share in row.shares)
    padding = "unknown" if row.padding is None else f"{row.padding:,}"
    numbers = (f"{row.choices:,}", padding, f"{row.balance:.3f}", f"{row.entropy:.3f}", f"{row.dropped:,}")
    return (row.path, row.routes, *numbers, shares)
