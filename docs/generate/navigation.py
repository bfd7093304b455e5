"""The order of pages at the left. A page that is in no list here, and not made, is a warning of mkdocs."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import api_pages
import facts
from links import ROOT, copies

SECTIONS = {
    "Use": (
        *(
            "start",
            "recipes",
            "moving-from-peft",
            "peft-names",
            "choose",
            "training",
            "quantization",
            "several",
            "mixtures",
            "serving",
        ),
        *("files", "readers", "concepts", "roles", "promises", "performance", "benchmarks"),
    ),
    "Extend": ("write-a-method", "write-a-format", "hooks"),
    "Project": ("found", "checks", "architecture", "CONTRIBUTING", "SECURITY", "CHANGELOG"),
}


def nav() -> list[Any]:
    """What mkdocs takes as ``nav``."""
    examples = [page for page in copies().values() if page.startswith("examples/") and page.endswith(".md")]
    decisions = ["decisions/README.md", *sorted(_below("decisions", "[0-9]*.md"))]
    return [
        {"Home": "index.md"},
        {"Use": _pages("Use")},
        {"Methods": _methods()},
        {"Extend": _pages("Extend")},
        {"Examples": examples},
        {"Reference": [{name: f"api/{name}.md"} for name in api_pages.MODULES]},
        {"Project": [*_pages("Project"), {"Decisions": decisions}]},
    ]


def _methods() -> list[Any]:
    groups = groupby(facts.every(), key=lambda each: each.info.category)
    return [
        "methods/index.md",
        *({category: [f"methods/{each.name}.md" for each in found]} for category, found in groups),
    ]


def _pages(section: str) -> list[Any]:
    made = set(copies().values())
    pages = [f"{name}.md" for name in SECTIONS[section]]
    return [page for page in pages if page in made or (ROOT / "docs" / page).exists()]


def _below(folder: str, pattern: str) -> list[str]:
    return [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / folder).glob(pattern)]
