"""House rules that no linter knows: where things lie, and how long they are."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
PYPROJECTS = [ROOT / "pyproject.toml", *(plugin / "pyproject.toml" for plugin in PLUGINS)]
CORE = sorted((ROOT / "peftcore").rglob("*.py"))
METHOD_FILES = sorted(ROOT.glob("plugins/*/peftcore_*/[!_]*.py"))

SELECTION = "it only chooses tensors: the operator is the core's Replacement"
OTHER_LENGTHS = {
    "plugins/selective/peftcore_selective/bitfit.py": SELECTION,
    "plugins/selective/peftcore_selective/linear_probe.py": SELECTION,
    "plugins/selective/peftcore_selective/ln_tuning.py": SELECTION,
}
"""Method files that are not 60 to 150 lines long, by path, and why that is right."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_tests_plugins_and_docs_are_no_packages() -> None:
    """The root is on sys.path in an editable installation: a package called `tests` would shadow the user's own."""
    tests = [*ROOT.glob("tests/**/__init__.py"), *ROOT.glob("plugins/*/tests/**/__init__.py")]
    roots = [*ROOT.glob("plugins/__init__.py"), *ROOT.glob("plugins/*/__init__.py"), *ROOT.glob("docs/**/__init__.py")]
    assert not [relative(path) for path in (*tests, *roots)]


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_core_module_stays_under_400_lines(path: Path) -> None:
    assert lines(path) < 400


@pytest.mark.parametrize("path", METHOD_FILES, ids=relative)
def test_method_file_is_60_to_150_lines_unless_a_reason_is_declared(path: Path) -> None:
    fits = 60 <= lines(path) <= 150
    assert fits != (relative(path) in OTHER_LENGTHS), f"{relative(path)} has {lines(path)} lines"


def test_declared_reasons_belong_to_files_that_exist() -> None:
    assert set(OTHER_LENGTHS) <= {relative(path) for path in METHOD_FILES}


def test_all_packages_have_one_version() -> None:
    assert len({toml(path)["project"]["version"] for path in PYPROJECTS}) == 1


@pytest.mark.parametrize("plugin", PLUGINS, ids=relative)
def test_plugin_is_named_after_its_folder(plugin: Path) -> None:
    project = toml(plugin / "pyproject.toml")["project"]
    assert project["name"] == f"peftcore-{plugin.name}"
    assert project["entry-points"] == {"peftcore": {plugin.name: f"peftcore_{plugin.name}"}}
    assert f"-e plugins/{plugin.name}" in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", [*ROOT.glob("requirements*.txt"), *PYPROJECTS], ids=relative)
def test_requirements_are_ranges_of_plain_releases(path: Path) -> None:
    """A pin to a local build ('+cpu') or to one release installs on one kind of machine only."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\+cpu|==\s*\d", text)
