"""The two commands of docs/benchmarks.md run, and the page has what they wrote."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/benchmarks.md"


def run(module: str, root: Path, *methods: str) -> dict[str, Any]:
    """What a run of few steps writes under another root, by part."""
    (root / "benchmarks").mkdir(exist_ok=True)
    (root / "docs").mkdir(exist_ok=True)
    shutil.copy(PAGE, root / "docs")
    steps = {"vision": "5", "diffusion": "2"}[module]  # with fewer a head that was left as trained reads the same
    command = [sys.executable, "-m", f"benchmarks.{module}", *methods, "--page", "--steps", steps, "--root", str(root)]
    paths = os.pathsep.join([str(ROOT), *map(str, ROOT.glob("plugins/*")), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((root / f"benchmarks/{module}.json").read_text(encoding="utf-8"))["parts"]


def between_marks(page: Path, module: str) -> str:
    text = page.read_text(encoding="utf-8").partition(f"<!-- begin: python -m benchmarks.{module} --page -->")[2]
    return text.partition("<!-- end -->")[0]


@pytest.mark.slow
def test_vision_is_measured_and_written(tmp_path: Path) -> None:
    part = run("vision", tmp_path, "vpt_deep", "coop", "full")["vit"]
    assert sorted(part["rows"]) == ["full", "vpt_deep"] and list(part["refused"]) == ["coop"]
    assert part["rows"]["full"]["trainable"] == part["about"]["total"] > 10 * part["rows"]["vpt_deep"]["trainable"]
    scores = part["rows"]["vpt_deep"]["scores"]
    assert scores["restored"] == [1.0, 1.0, 1.0]
    assert all(0 <= value <= 1 for values in scores.values() for value in values)
    run("vision", tmp_path, "linear_probe")
    part = json.loads((tmp_path / "benchmarks/vision.json").read_text(encoding="utf-8"))["parts"]["vit"]
    assert sorted(part["rows"]) == ["full", "linear_probe", "vpt_deep"], "others keep their rows"
    assert part["rows"]["linear_probe"]["scores"]["kept"] == [part["about"]["known"]] * 3, "the old head, old features"
    assert "| `vpt_deep` |" in between_marks(tmp_path / "docs/benchmarks.md", "vision")
    assert (tmp_path / "benchmarks/vision.png").exists()


@pytest.mark.slow
def test_diffusion_is_measured_and_written(tmp_path: Path) -> None:
    parts = run("diffusion", tmp_path, "svdiff", "t2i_adapter")
    assert sorted(parts["UNet"]["rows"]) == ["svdiff", "t2i_adapter", "unadapted"]
    assert sorted(parts["SD3"]["rows"]) == ["svdiff", "unadapted"] and list(parts["SD3"]["refused"]) == ["t2i_adapter"]
    for part in parts.values():
        assert all(math.isfinite(value) for row in part["rows"].values() for value in row["scores"]["error"])
        assert "other_error" not in part["rows"]["svdiff"]["scores"]
    assert "other_error" in parts["UNet"]["rows"]["t2i_adapter"]["scores"]
    assert "Told the edges" in between_marks(tmp_path / "docs/benchmarks.md", "diffusion")
    assert (tmp_path / "benchmarks/diffusion.png").exists()


@pytest.mark.parametrize("module", ["vision", "diffusion"])
def test_the_page_has_the_rows_of_the_file(module: str) -> None:
    """Of a full run; until there was one, the page says so."""
    table, file = between_marks(PAGE, module), ROOT / f"benchmarks/{module}.json"
    if not file.exists():
        assert "No run is recorded here yet" in table
        return
    for part in json.loads(file.read_text(encoding="utf-8"))["parts"].values():
        for name in part["rows"].keys() - {"full", "unadapted"}:
            lines = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
            assert any(f" {part['rows'][name]['trainable']:,} |" in line for line in lines), name
