"""With whose numbers the tests of a plugin compare, as its package says."""

from pathlib import Path

import pytest

import peftcore
from peftcore.errors import PluginError
from peftcore.registry import evidence
from peftcore.registry.evidence import EvidenceRow, Source, parts, read, sources, written

CODE = Source("authors", "owner/code", "abc123", "model.py")
AUTHORS, START, PEFT = EvidenceRow(CODE), EvidenceRow(CODE, "start"), EvidenceRow(Source("peft 0.21"))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "evidence.json"
    assert read(file) == {}
    file = tmp_path / "other.json"
    file.write_text(written({"b": [PEFT], "a": [AUTHORS, PEFT, PEFT]}))
    assert read(file) == {"a": (AUTHORS, PEFT), "b": (PEFT,)}
    assert file.read_text() == written(read(file))


def test_what_is_compared_stands_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start alone is no reason to trust what a method computes; which tensors train is, of one that chooses them."""
    package = tmp_path / "compared_elsewhere"
    package.mkdir()
    (package / "__init__.py").write_text("")
    trains = EvidenceRow(CODE, "trains")
    file = package / "evidence.json"
    file.write_text(written({"both": [START, AUTHORS, PEFT], "start": [START], "chosen": [trains]}))
    assert read(file) == {"both": (AUTHORS, START, PEFT), "start": (START,), "chosen": (trains,)}
    monkeypatch.syspath_prepend(tmp_path)
    assert parts("compared_elsewhere", "both") == {"peft 0.21": ("outputs",), "the authors' code": ("outputs", "start")}
    assert sources("compared_elsewhere", "both") == "peft 0.21, the authors' code"
    assert sources("compared_elsewhere", "start") == ""
    assert sources("compared_elsewhere", "chosen") == "the authors' code"


def test_sources_of_a_method_are_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is not imported; a single module, and a notebook, have none."""
    package = tmp_path / "proved_elsewhere"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError")
    (package / "evidence.json").write_text(written({"mine": [AUTHORS, PEFT]}))
    (tmp_path / "single_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert sources("proved_elsewhere.mine:Mine", "mine") == "peft 0.21, the authors' code"
    assert sources("proved_elsewhere.mine:Mine", "other") == ""
    assert sources("single_module:Mine", "mine") == sources("__main__:Mine", "mine") == ""


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for number, text in enumerate(("[]", '{"a": [{"paper": 1}]}', '{"a": [{"name": "b", "compared": ["end"]}]}', "{")):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        with pytest.raises(PluginError, match="is not a valid evidence file"):
            read(file)


def test_what_a_method_says_itself_is_no_evidence() -> None:
    assert evidence.FILE == "evidence.json"
    peqa = next(info for info in peftcore.methods() if info.name == "peqa")
    assert not peqa.checked and peqa.checked_against == ""
