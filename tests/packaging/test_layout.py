"""House rules that no linter knows: where things lie, and how long they are."""

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
LAB = ROOT / "plugins/lab"
"""The plugin that brings commands and no methods."""
OF_METHODS = [plugin for plugin in PLUGINS if plugin != LAB]
PYPROJECTS = [ROOT / "pyproject.toml", *(plugin / "pyproject.toml" for plugin in PLUGINS)]
NO_METHODS = {"interop", "backends"}
"""Folders of a plugin that are no method: formats of files, and quantizers."""
FOLDERS = {
    plugin: [path.parent for path in plugin.glob("peftcore_*/[!_]*/__init__.py") if path.parent.name not in NO_METHODS]
    for plugin in OF_METHODS
}
"""Methods of each plugin that are a folder."""
METHOD_FILES = sorted(file for plugin in OF_METHODS for file in plugin.glob("peftcore_*/[!_]*.py"))
METHOD_FILES += sorted(file for folders in FOLDERS.values() for folder in folders for file in folder.glob("*.py"))


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


@pytest.mark.parametrize("path", METHOD_FILES, ids=relative)
def test_a_method_file_is_one_idea(path: Path) -> None:
    """Helpers that serve one method stand in its file, which may be long for that; what is longer still is a folder."""
    assert lines(path) <= 350, f"{relative(path)} has {lines(path)} lines"


@pytest.mark.parametrize("folder", [each for folders in FOLDERS.values() for each in folders], ids=relative)
def test_a_method_is_a_folder_only_where_a_file_is_too_long(folder: Path) -> None:
    assert sum(map(lines, folder.glob("*.py"))) > 350, f"{relative(folder)} fits into one file"


@pytest.mark.parametrize("plugin", OF_METHODS, ids=relative)
def test_private_modules_serve_several_methods(plugin: Path) -> None:
    """A helper that one module imports belongs into the file of its method."""
    package = plugin / f"peftcore_{plugin.name}"
    texts = {path: path.read_text(encoding="utf-8") for path in package.glob("**/*.py")}
    lonely = [
        path.stem
        for path in package.glob("_[!_]*.py")
        if path.stem != "_presets"
        and sum(re.search(rf"\b{package.name}\.{path.stem}\b", text) is not None for text in texts.values()) < 2
    ]
    assert not lonely, f"put them back into the files of their methods: {lonely}"


@pytest.mark.parametrize("plugin", OF_METHODS, ids=relative)
def test_each_method_has_a_file_a_name_and_a_test(plugin: Path) -> None:
    """And nothing else: there is no other place to touch."""
    package = f"peftcore_{plugin.name}"
    named = importlib.import_module(package).peftcore_methods()
    files = {path.stem for path in (plugin / package).glob("[!_]*.py")} | {path.name for path in FOLDERS[plugin]}
    tests = {path.stem.removeprefix("test_") for path in (plugin / "tests").glob("test_*.py")}
    assert {place.partition(":")[0] for place in named.values()} == {f"{package}.{name}" for name in named}
    assert set(named) == files
    assert files <= tests


@pytest.mark.parametrize("plugin", PLUGINS, ids=relative)
def test_plugin_is_named_after_its_folder(plugin: Path) -> None:
    project = toml(plugin / "pyproject.toml")["project"]
    assert project["name"] == f"peftcore-{plugin.name}"
    package = f"peftcore_{plugin.name}"
    backends = {path.stem: f"{package}.backends.{path.stem}" for path in (plugin / package).glob("backends/[!_]*.py")}
    assert project["entry-points"] == {"peftcore": {plugin.name: package, **backends}}
    development = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    assert f"-e plugins/{plugin.name}" in {line.partition("[")[0] for line in development.splitlines()}


@pytest.mark.parametrize("path", [*ROOT.glob("requirements*.txt"), *PYPROJECTS], ids=relative)
def test_requirements_are_ranges_of_plain_releases(path: Path) -> None:
    """A pin to a local build ('+cpu') or to one release installs on one kind of machine only."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\+cpu|==\s*\d", text)
