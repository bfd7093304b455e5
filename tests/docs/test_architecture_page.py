"""docs/architecture.md names every module of the core once, and its layers are those of the imports."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = ROOT / "peftcore"
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
LAYERS = [re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) for part in re.split(r"^### \d", PAGE, flags=re.MULTILINE)]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def parts() -> set[str]:
    """Modules and packages of the core, but for those with underscores."""
    files = {path.stem for path in CORE.glob("[!_]*.py")}
    return files | {path.parent.name for path in CORE.glob("*/__init__.py")}


def imported(file: Path) -> set[str]:
    """The parts that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "peftcore":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("peftcore."):
            found.add(node.module.split(".")[1])
    return found


def test_every_part_is_named_once() -> None:
    named = [name for names in LAYERS for name in names]
    assert sorted(named) == sorted(parts())


def test_imports_go_down() -> None:
    wrong = []
    for name in LEVEL:
        files = [CORE / f"{name}.py"] if (CORE / f"{name}.py").exists() else sorted((CORE / name).rglob("*.py"))
        for file in files:
            above = {other for other in imported(file) & set(LEVEL) if LEVEL[other] > LEVEL[name]}
            wrong += [f"{file.relative_to(ROOT)} imports {other}" for other in sorted(above)]
    assert not wrong
