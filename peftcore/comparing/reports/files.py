"""Writes the files that a comparison leaves in its folder: JSON for programs, a picture, and a page for people."""

from __future__ import annotations

from pathlib import Path

from peftcore.comparing.reports.html import page
from peftcore.comparing.reports.plots import draw_picture
from peftcore.comparing.reports.trials import Report
from peftcore.files.safe_io import write_text


def write(report: Report, folder: Path) -> None:
    """Write ``results.json``, ``results.png`` and ``report.html``."""
    write_text(folder / "results.json", report.as_json())
    write_text(folder / "report.html", page(report))
    draw_picture(report, folder / "results.png")
