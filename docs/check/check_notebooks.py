"""`make docs-check`: runs every notebook of docs/notebooks, its code cells in their order, in a process of its own.

The models that they name are small ones of the same names here (`tests/toys/hub_stand_ins.py`), kept in
build/stand-ins, so nothing is fetched. Cells that install are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
STAND_INS = ROOT / "build/stand-ins"

sys.path.insert(0, str(ROOT / "tests/toys"))

from hub_stand_ins import named_in, stand_in  # noqa: E402


def cells(notebook: Path) -> list[str]:
    """The code of a notebook, without commands of notebooks."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(each["source"]) for each in found if each["cell_type"] == "code"]
    return [each for each in code if not each.startswith(("%", "!"))]


def wrong(notebook: Path, cache: Path) -> str | None:
    """Run a notebook; return the end of what it says when a cell fails.

    Args:
        cache: the folder that stands for the cache of the hub; the models that the notebook names are put there.
    """
    code = "\n\n".join(cells(notebook))
    for name in named_in(code):
        stand_in(cache, name)
    places = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "cells.py")
        program.write_text(code, encoding="utf-8")
        line = [sys.executable, str(program)]
        ran = subprocess.run(line, cwd=folder, env=os.environ | places, capture_output=True, text=True, check=False)
    return f"{notebook.name}\n{ran.stderr[-2000:]}" if ran.returncode else None


def main() -> int:
    failed = [found for each in NOTEBOOKS if (found := wrong(each, STAND_INS))]
    print("\n\n".join(failed) or f"{len(NOTEBOOKS)} notebooks run.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
