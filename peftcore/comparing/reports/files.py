"""Writes the files that a comparison leaves in its folder: JSON for programs, tables for papers, a picture, and a page
for people."""

from __future__ import annotations

from pathlib import Path

from peftcore.comparing.reports import tables
from peftcore.comparing.reports.html import page
from peftcore.comparing.reports.plots import draw_picture
from peftcore.comparing.reports.trials import Report
from peftcore.files.safe_io import write_text


def write(report: Report, folder: Path) -> None:
    """Write ``results.json``, the table as ``.csv``, ``.md`` and ``.tex``, ``results.png`` and ``report.html``."""
    tables.write(report, folder)
    write_text(folder / "report.html", page(report, folder))
    draw_picture(report, folder / "results.png")
