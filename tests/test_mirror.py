"""Tests mirror the tree: each module of the core has a test file of its name, and such a file names a module.

Tests of one module that are about one side of it stand beside its file under a longer name: ``test_attention.py`` and
``test_attention_generation.py``. What goes through many modules stands in folders that no package is called like.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"cli": "by command, in tests/cli", "testing": "by what the kit must find out, in tests/kit"}
"""Packages whose tests are sorted otherwise, and how."""
BY_COMMANDS = {"models"}
"""Packages of which the commands, tests/cli, show much: their modules need no test file, but a file names a module."""

DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.If)
"""A module without them, such as a shelf of `peftcore.author`, needs no tests of its own."""
PACKAGES = sorted(path.parent.name for path in ROOT.glob("peftcore/*/__init__.py") if path.parent.name not in ELSEWHERE)
MODULES = {
    path.relative_to(ROOT / "peftcore").with_suffix("").as_posix()
    for package in PACKAGES
    for path in ROOT.glob(f"peftcore/{package}/**/*.py")
    if path.stem != "__init__" and any(isinstance(node, DEFINITIONS) for node in ast.parse(path.read_text()).body)
}
FILES = sorted(
    path.relative_to(ROOT / "tests") for package in PACKAGES for path in ROOT.glob(f"tests/{package}/**/test_*.py")
)


LAB = ROOT / "plugins/lab"
OF_LAB = {
    path.relative_to(LAB / "peftcore_lab").with_suffix("").as_posix() for path in LAB.glob("peftcore_lab/**/*.py")
}
"""Modules of the lab. Its commands show much, so a module needs no test file, but a file names a module."""


def module_of(file: Path) -> str:
    return (file.parent / file.stem.removeprefix("test_")).as_posix()


@pytest.mark.parametrize("module", sorted(each for each in MODULES if each.split("/")[0] not in BY_COMMANDS))
def test_a_module_has_tests_of_its_name(module: str) -> None:
    package, _, name = module.rpartition("/")
    file = ROOT / f"tests/{package}/test_{name}.py"
    assert file.exists(), f"peftcore/{module}.py has no {file.relative_to(ROOT)}"
    parsed = ast.parse(file.read_text(encoding="utf-8"))
    assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in parsed.body)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_test_file_names_a_module_or_one_side_of_one(file: Path) -> None:
    named = module_of(file)
    assert named in MODULES or any(
        named.startswith(f"{module_of(each)}_") and module_of(each) in MODULES for each in FILES
    ), f"there is no peftcore/{named}.py"


@pytest.mark.parametrize("file", sorted(LAB.glob("tests/**/test_*.py")), ids=lambda file: file.stem)
def test_a_test_file_of_the_lab_names_a_module_or_tests_commands(file: Path) -> None:
    named = module_of(file.relative_to(LAB / "tests"))
    assert named.startswith("commands/") or named in OF_LAB, f"there is no peftcore_lab/{named}.py"


def test_what_runs_by_hand_left_no_adapter_in_the_root() -> None:
    assert not [*ROOT.glob("*/adapter.json")]
