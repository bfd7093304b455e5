"""The notebooks in docs/notebooks, one for each section of docs/recipes.md: its words and its code, cell by cell.

``python docs/generate/notebooks.py`` writes them; a test compares them with the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/recipes.md"
FOLDER = ROOT / "docs/notebooks"
ADDRESS = "https://github.com/peftcore/peftcore/blob/main/docs/"
"""Where links of the page lead, for a notebook that lies by itself."""
ITSELF = re.compile(r" \[The notebook\]\(notebooks/[\w-]+\.ipynb\)\.")
LINK = re.compile(r"\]\(([\w-]+\.md(?:#[\w-]+)?)\)")
CODE = re.compile(r"^```python\n(.*?)^```\n?", re.MULTILINE | re.DOTALL)
INSTALL = '%pip install --quiet "peftcore[all]"'


def notebooks() -> dict[str, str]:
    """The text of each notebook, by the name of its file."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {f"{slug(each.partition(chr(10))[0])}.ipynb": notebook(f"# {each}") for each in sections}


def slug(heading: str) -> str:
    return "-".join(re.findall(r"\w+", heading.lower()))


def notebook(section: str) -> str:
    """A section as a notebook, without outputs."""
    made = [{**cell, "id": f"cell-{number}"} for number, cell in enumerate(cells(section))]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    document = {"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def cells(section: str) -> Iterator[dict[str, Any]]:
    """Words and code in turn; the line that installs is the first code."""
    words = LINK.sub(rf"]({ADDRESS}\1)", ITSELF.sub("", section))
    for number, piece in enumerate(CODE.split(words)):
        if text := piece.strip():
            yield code(text) if number % 2 else {"cell_type": "markdown", "metadata": {}, "source": lines(text)}
        if number == 0:
            yield code(INSTALL)


def code(text: str) -> dict[str, Any]:
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": lines(text)}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Write the notebooks, and remove those of sections that are gone."""
    FOLDER.mkdir(exist_ok=True)
    found = notebooks()
    for old in FOLDER.glob("*.ipynb"):
        if old.name not in found:
            old.unlink()
    for name, text in found.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
