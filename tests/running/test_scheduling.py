"""A test that ends its worker fails, once, and the run goes on: with what came behind it, and to its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("marks", ["", "not slow"], ids=["one by one", "by file"])
@pytest.mark.parametrize(("ends", "behind"), [("os._exit(1)", 0), ("os._exit(1)", 1), ("time.sleep(100)", 5)])
def test_a_worker_that_ends_is_one_failure(tmp_path: Path, ends: str, behind: int, marks: str) -> None:
    lines = ["import os, time", "def test_before(): pass", f"def test_ends(): {ends}"]
    lines += [f"def test_behind_{number}(): pass" for number in range(behind)]
    (tmp_path / "test_it.py").write_text("\n".join(lines))
    options = [
        "-q",
        "-m",
        marks,
        "-n",
        "2",
        "-p",
        "scheduling",
        "--timeout=3",
        "--timeout-method=thread",
        "--rootdir",
        str(tmp_path),
    ]
    environment = {
        **os.environ,
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_it.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 1, ran.stdout
    assert f"1 failed, {behind + 1} passed" in ran.stdout
    assert "crashed while running 'test_it.py::test_ends'" in ran.stdout
