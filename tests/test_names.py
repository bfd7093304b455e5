"""Names are unique: no two modules, and no two public classes, of the core and the lab share a name; nor do two of one
plugin. So a name in a traceback or a page says which module or class it is.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = [*ROOT.glob("peftcore/**/*.py"), *ROOT.glob("plugins/lab/peftcore_lab/**/*.py")]
PLUGINS = {
    folder.name: [*folder.glob("peftcore_*/**/*.py")] for folder in ROOT.glob("plugins/*") if folder.name != "lab"
}
GROUPS = {"core": CORE, **{name: files for name, files in PLUGINS.items() if files}}

EVERY_PACKAGE = {"__init__", "__main__"}
INTEROP = "interop"
"""The folder of a plugin with the formats of its methods: a module in it may have the name of its method's module."""
VAGUE = {
    *("alike", "beside", "common", "draws", "ends", "found", "helpers", "looking", "misc", "places", "rest", "telling"),
    *("together", "words"),
}
"""Names of files or folders that do not say what these hold."""
TWO_SHELVES = {"Held"}
"""Public classes of `peftcore.author` and of `peftcore.author.formats` with one name: a page or an author that imports
one of them names its shelf."""


def files_by_name(files: Iterable[Path]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for file in files:
        if file.stem not in EVERY_PACKAGE:
            kind = f"{INTEROP}/" if INTEROP in file.parts else ""
            found[f"{kind}{file.stem}"].append(file.relative_to(ROOT).as_posix())
    return found


def classes_by_name(files: Iterable[Path]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(file.relative_to(ROOT).as_posix())
    return found


def repeated(found: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: sorted(files) for name, files in found.items() if len(files) > 1}


@pytest.mark.parametrize("group", GROUPS)
def test_no_two_modules_have_one_name(group: str) -> None:
    assert repeated(files_by_name(GROUPS[group])) == {}


@pytest.mark.parametrize("group", GROUPS)
def test_no_two_public_classes_have_one_name(group: str) -> None:
    found = repeated(classes_by_name(GROUPS[group]))
    assert {name: files for name, files in found.items() if group != "core" or name not in TWO_SHELVES} == {}


def test_classes_of_two_shelves_are_public_in_both() -> None:
    from peftcore import author
    from peftcore.author import formats

    assert {*author.__all__} & {*formats.__all__} & repeated(classes_by_name(CORE)).keys() == TWO_SHELVES


@pytest.mark.parametrize("group", GROUPS)
def test_names_of_files_and_folders_say_what_these_hold(group: str) -> None:
    parts = {part for file in GROUPS[group] for part in file.relative_to(ROOT).with_suffix("").parts}
    assert {part for part in parts if part.lstrip("_") in VAGUE} == set()


def test_repeated_names_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    files = [tmp_path / "a/place.py", tmp_path / "b/place.py", tmp_path / INTEROP / "place.py"]
    for file in files:
        file.parent.mkdir()
        file.write_text("class Place: ...\nclass _Own: ...\n", encoding="utf-8")
    assert repeated(files_by_name(files)) == {"place": ["a/place.py", "b/place.py"]}
    assert [*repeated(classes_by_name(files))] == ["Place"]
