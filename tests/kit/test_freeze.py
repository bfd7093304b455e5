"""The command that runs the authors' code again: it compares, and writes only when it is told to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftcore.testing.freeze import close, main

SCRIPT = """
from peftcore.registry.evidence import Source
SOURCE, VERSIONS = Source("authors", "owner/code", "abc123", "model.py"), ("torch",)
def numbers(checkout): return [float(each) for each in (checkout / SOURCE.script).read_text().split()]
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    script = tmp_path / "theirs.py"
    script.write_text(SCRIPT)
    (tmp_path / "model.py").write_text("1.5 2.5")
    return script


def test_it_compares_and_leaves_the_file_alone(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(script), str(script.parent), "--write"]) == 0
    file = script.with_suffix(".json")
    before = file.read_bytes()
    assert json.loads(before)["numbers"] == [1.5, 2.5]
    assert main([str(script), str(script.parent)]) == 0
    assert "theirs.json: the same numbers" in capsys.readouterr().out
    (script.parent / "model.py").write_text("1.5 2.6")
    assert main([str(script), str(script.parent)]) == 1
    assert "other numbers come out; --write" in capsys.readouterr().out
    assert file.read_bytes() == before
    assert main([str(script), str(script.parent), "--write"]) == 0
    assert json.loads(file.read_text())["numbers"] == [1.5, 2.6]


def test_without_a_file_nothing_is_written(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(script), str(script.parent)])
    assert "pass --write to create it" in capsys.readouterr().err and not script.with_suffix(".json").exists()


def test_numbers_are_equal_up_to_rounding() -> None:
    assert close({"a": [1.0, True, "b"]}, {"a": [1.000001, True, "b"]})
    assert not close([1.0], [1.001]) and not close([1.0], [1.0, 2.0]) and not close({"a": 1}, {"b": 1})
