"""Every python block in README and docs runs, in page order; what claims to be a file is the text of that file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # blocks may write files
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_readme_method_is_the_example() -> None:
    """The method in the README is the one of the third-party example: same code, comments and docstrings aside."""
    example = ROOT / "examples/third-party-plugin/peftcore_example_scale/diag_scale.py"
    shown = next(block for block in blocks(ROOT / "README.md") if "class DiagScaleOperator" in block)
    assert _calls(shown) == _calls(example.read_text(encoding="utf-8"))


def _calls(code: str) -> list[str]:
    """The expressions that a method computes: what must not drift apart."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call | ast.BinOp)]
