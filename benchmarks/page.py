"""``docs/performance.md``: its tables are what a run found, between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.rows import Row
from benchmarks.scaling import Growth

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- begin: python -m benchmarks --page -->", "<!-- end -->"


def tables(rows: Iterable[Row], growth: Iterable[Growth], circumstances: Mapping[str, str]) -> str:
    """All that was found, as Markdown."""
    lines = ["; ".join(f"{name} {value}" for name, value in circumstances.items()) + ".", ""]
    lines += ["| figure | peftcore | peft | ratio (95 %) | wanted | |", "|---|---|---|---|---|---|"]
    for row in rows:
        mark = "" if row.reached else "**not reached**"
        lines.append(f"| {row.figure} | {row.ours} | {row.theirs} | {row.ratio} | {row.goal} | {mark} |")
    lines += ["", "| growth | over | steepest between neighbours (1 is linear) |", "|---|---|---|"]
    for each in growth:
        steepest = ", ".join(f"{name} {exponent:.2f}" for name, exponent in each.exponents().items())
        lines.append(f"| {each.title} | {each.over}, {each.sizes[0]:,} to {each.sizes[-1]:,} | {steepest} |")
    return "\n".join(lines)


def write(text: str, page: Path = PAGE) -> None:
    """Put the tables in the place of those that are there."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
