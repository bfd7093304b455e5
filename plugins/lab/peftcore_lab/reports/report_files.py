"""Writes the result files of a comparison to its folder: JSON for programs, tables for papers, a picture, and an HTML
page."""

from __future__ import annotations

from pathlib import Path

from peftcore.files.safe_io import write_text
from peftcore_lab.reports import paper_tables
from peftcore_lab.reports.html import page
from peftcore_lab.reports.plots import draw_picture
from peftcore_lab.reports.trials import ComparisonReport


def write(report: ComparisonReport, folder: Path) -> None:
    """Write ``results.json``, the table as ``.csv``, ``.md`` and ``.tex``, ``results.png`` and ``report.html``."""
    paper_tables.write(report, folder)
    write_text(folder / "report.html", page(report, folder))
    draw_picture(report, folder / "results.png")
