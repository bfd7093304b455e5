"""The examples on digits run from end to end: with few steps, in a process of their own, as a reader starts them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def run(example: str, out: Path) -> tuple[str, dict[str, Any]]:
    """What it printed, and its results.json."""
    command = [sys.executable, str(EXAMPLES / example / "run.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "results.json").read_text(encoding="utf-8"))


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(PNG) and 5_000 < path.stat().st_size < 300_000


@pytest.mark.slow
def test_classifiers(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    printed, document = run("digits-classifiers", tmp_path)
    assert is_picture(tmp_path / "accuracy.png")
    for host in ("ViT", "ConvNet"):
        rows = {row["method"]: row for row in document["results"] if row["host"] == host}
        bare, full = rows.pop("unadapted"), rows.pop("full fine-tuning")
        assert len(rows) == 10
        assert set(rows) <= set(printed.split())
        assert all(0 < row["trainable"] < full["trainable"] for row in rows.values())
        better = [name for name, row in rows.items() if row["accuracy"] > bare["accuracy"] + 0.05]
        assert len(better) >= 7, rows  # after a tenth of the steps


@pytest.mark.slow
def test_several_tasks(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    printed, document = run("several-tasks", tmp_path)
    rows = {row["method"]: row for row in document["results"]}
    assert len(rows) == 8 and {"adapter_fusion", "hyperformer", "mtl_lora", "polytropon"} < {*printed.split()}
    assert all([*row["accuracy"]] == ["digits", "wines", "tumours"] for row in rows.values())
    assert all((row["trainable"] == 0) == (name == "head alone") for name, row in rows.items())
    assert max(row["accuracy"]["wines"] for row in rows.values()) > 0.6  # after a tenth of the steps


@pytest.mark.slow
def test_diffusion(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    printed, document = run("digits-diffusion", tmp_path)
    assert all(is_picture(tmp_path / f"{name}.png") for name in ("unet", "dit", "edges"))
    for host in ("UNet", "DiT"):
        rows = {row["method"]: row for row in document["styles"] if row["host"] == host}
        bare = rows.pop("unadapted")
        assert len(rows) == 3
        assert set(rows) <= set(printed.split())
        # Digits take longer than a few steps to learn; that the paper is grey shows at once.
        assert max(row["style"] for row in rows.values()) > bare["style"] + 0.3, (bare, rows)
    steering = {row["method"]: row["overlap"] for row in document["steering"]}
    assert steering.keys() == {"unadapted", "controlnet", "t2i_adapter", "controlnet + lora"}


@pytest.mark.slow
def test_one_tower_of_a_llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    runpy.run_path(str(EXAMPLES / "llava-towers" / "run.py"), run_name="__main__")
    torch.set_num_threads(threads)
    bare, vision, text = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert (vision["target"], text["target"]) == ("vision:all-linear", "text:all-linear")
    assert vision["operators"] == {"vision": 18, "text": 0} and text["operators"] == {"vision": 0, "text": 14}
    assert vision["other_unchanged"] and text["other_unchanged"]
    assert vision["lying"] > bare["lying"] + 0.05, (bare, vision)  # after a quarter of the steps


@pytest.mark.slow
def test_dreambooth(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    script = EXAMPLES / "digits-diffusion" / "dreambooth.py"
    subprocess.run([sys.executable, str(script), "--quick", "--out", str(tmp_path)], check=True, timeout=600)
    without, preserved = json.loads((tmp_path / "dreambooth.json").read_text(encoding="utf-8"))
    assert is_picture(tmp_path / "dreambooth.png")
    assert preserved["drift"] < 0.7 * without["drift"]
