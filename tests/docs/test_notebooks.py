"""Notebooks are what the page of recipes says, and each of them runs by itself."""

import json
import sys
from pathlib import Path

import pytest

import notebooks

sys.path.append(str(Path(__file__).parents[2] / "docs/check"))


def test_notebooks_are_what_the_script_writes() -> None:
    """Written anew with ``python docs/generate/notebooks.py``."""
    there = {path.name: path.read_text(encoding="utf-8") for path in notebooks.FOLDER.glob("*.ipynb")}
    assert there == notebooks.notebooks()
    assert len(there) == 4


def test_a_notebook_has_the_words_and_the_code_of_its_section_in_their_order() -> None:
    code = "```python\nx = 1\n```\n\nThen:\n\n```python\ny = x\n```\n"
    text = f"# A\n\nSee [b](b.md#c). [The notebook](notebooks/a.ipynb).\n\n{code}"
    cells = json.loads(notebooks.notebook(text))["cells"]
    assert ["".join(each["source"]) for each in cells] == [
        f"# A\n\nSee [b]({notebooks.ADDRESS}b.md#c).",
        notebooks.INSTALL,
        "x = 1",
        "Then:",
        "y = x",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(notebooks.FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_process_of_its_own(path: Path, tmp_path: Path) -> None:
    from check_notebooks import wrong

    assert wrong(path, tmp_path / "hub") is None


@pytest.mark.slow
def test_a_notebook_that_fails_is_seen(tmp_path: Path) -> None:
    from check_notebooks import wrong

    broken = tmp_path / "broken.ipynb"
    broken.write_text(notebooks.notebook("# A\n\n```python\nassert False, 'this cell'\n```\n"), encoding="utf-8")
    assert "this cell" in (wrong(broken, tmp_path / "hub") or "")
