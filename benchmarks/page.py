"""Writes the tables of ``docs/performance.md``, each between two marks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.rows import Row
from benchmarks.scaling import Growth

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
README = Path(__file__).parents[1] / "README.md"
END = "<!-- end -->"


def figures(rows: Iterable[Row], circumstances: Mapping[str, str]) -> str:
    """Return the figures, and their circumstances, as Markdown."""
    lines = ["; ".join(f"{name} {value}" for name, value in circumstances.items()) + ".", ""]
    lines += ["| figure | peftcore | peft | ratio (95 %) | wanted | |", "|---|---|---|---|---|---|"]
    for row in rows:
        mark = "" if row.reached else "**not reached**"
        lines.append(f"| {row.figure} | {row.ours} | {row.theirs} | {row.ratio} | {row.goal} | {mark} |")
    return "\n".join(lines)


def growths(found: Iterable[Growth]) -> str:
    """Return how costs grow, as Markdown."""
    lines = ["| growth | over | steepest between neighbours (1 is linear) |", "|---|---|---|"]
    for each in found:
        steepest = ", ".join(f"{name} {exponent:.2f}" for name, exponent in each.exponents().items())
        lines.append(f"| {each.title} | {each.over}, {each.sizes[0]:,} to {each.sizes[-1]:,} | {steepest} |")
    return "\n".join(lines)


def plain(figure: str) -> str:
    """Return a figure without the notation of very large numbers."""
    number, _, unit = figure.partition(" ")
    return f"{float(number):g} {unit}" if re.fullmatch(r"[\d.]+(e[+-]?\d+)?", number) else figure


def sell(rows: Iterable[Row], page: Path = README) -> None:
    """Put figures in the places that they have in the README's table, if they have one there."""
    text = page.read_text(encoding="utf-8")
    for row in rows:
        cells = re.compile(rf"^\| {re.escape(row.figure)} \| [^|]+ \| [^|]+ \|", re.MULTILINE)
        text = cells.sub(f"| {row.figure} | {plain(row.ours)} | {plain(row.theirs)} |", text)
    page.write_text(text, encoding="utf-8")


def write(command: str, *tables: str, page: Path = PAGE) -> None:
    """Put tables in the place of those that the same command put there before.

    Raises:
        ValueError: the page has no such place.
    """
    begin = f"<!-- begin: {command} -->"
    before, mark, rest = page.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{page} has no place {begin} … {END}")
    text = "\n\n".join(tables)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{END}{after}", encoding="utf-8")
