"""Packages are found and not imported; what is missing is said with the line that installs it."""

import sys
from pathlib import Path

import pytest

from peftcore.errors import BadInput, MissingPackage
from peftcore.utils import packages


def test_a_folder_is_found_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_imported").mkdir()
    (tmp_path / "never_imported" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.package_folder("never_imported") == tmp_path / "never_imported"
    assert packages.package_folder("never_imported.inside") is None
    assert packages.package_folder("no_such_package") is None
    assert "never_imported" not in sys.modules


def test_all_that_is_missing_is_named_at_once() -> None:
    packages.require({"torch": "torch"})
    with pytest.raises(MissingPackage) as refused:
        packages.require({"torch": "torch", "no_such": "peftcore[x]", "nor_this": "peftcore[x]"}, "--no-deps")
    assert str(refused.value) == "not installed: no_such, nor_this. Run: pip install --no-deps 'peftcore[x]'"
    assert isinstance(refused.value, BadInput) and isinstance(refused.value, ImportError)


def test_the_error_about_the_lab_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "has_lab", lambda: False)
    assert str(packages.lab_is_missing("x")) == (
        "x is part of peftcore-lab, which is not installed. Run: pip install peftcore-lab"
    )
    monkeypatch.setattr(packages, "has_lab", lambda: True)
    assert "run peftcore doctor" in str(packages.lab_is_missing("x"))
