"""What the README says in figures is what other places have found; and it stays short where it sells."""

import re
from pathlib import Path

import peftcore

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| \[(\w+)\]\((docs/[\w.#-]+)\) \|$", re.MULTILINE)
SECTIONS = {"everyday": "python -m benchmarks.everyday", "bench": "python -m benchmarks --threads 1 --page"}
"""Of the page of figures, by what the last column calls them."""


def measured(section: str) -> dict[str, tuple[str, str]]:
    """Both figures of each row that a command has written."""
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    table = page.partition(f"<!-- begin: {section} -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines() if line.startswith("| ")]
    return {label: (plain(ours), plain(theirs)) for label, ours, theirs in rows}


def plain(figure: str) -> str:
    """Without the notation of very large numbers."""
    number, _, unit = figure.partition(" ")
    return f"{float(number):g} {unit}" if re.fullmatch(r"[\d.]+(e[+-]?\d+)?", number) else figure


def test_figures_beside_peft_are_those_of_the_page_of_figures() -> None:
    rows = ROW.findall(README)
    assert 1 <= len(rows) <= 7
    for label, ours, theirs, command, _ in rows:
        assert measured(SECTIONS[command])[label] == (plain(ours), plain(theirs)), label


def test_the_number_of_methods_is_the_number_of_methods() -> None:
    assert f"\n{len(peftcore.methods())} methods of parameter-efficient fine-tuning" in README


def test_the_first_screen_installs_applies_and_shows_a_picture() -> None:
    screen = README.partition("\n## ")[0]
    assert 'pip install "peftcore[all]"' in screen
    code = re.findall(r"```python\n(.*?)```", screen, re.DOTALL)[0].split("\n\n")[-1]
    assert len(code.strip().splitlines()) == 8
    [picture] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", screen)
    assert (ROOT / picture).stat().st_size < 200_000
