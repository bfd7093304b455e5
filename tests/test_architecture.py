"""The tree is the architecture: imports go down, those inside functions too, and pages say what is there."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "peftcore"
LAB = ROOT / "plugins/lab/peftcore_lab"
"""What trains, compares and searches: above all of the core."""
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")

DEFERRED = {
    (
        "peftcore.training",
        "peftcore.trainers",
    ): "`Fleet`, `PeftcoreTrainer` and its callback are imported from `peftcore.training`",
    (
        "peftcore",
        "peftcore_lab.comparisons.modules",
    ): "`peftcore.compare` stands where `peftcore.apply` does, and is imported from peftcore-lab when it is asked for",
}
"""Imports that go up on purpose, inside a function or for types, each with its reason. No more than two."""
NAMED = {
    ("peftcore.registry.plugins", "peftcore.core_plugin"): "the core's own answers are loaded as any plugin's",
    ("peftcore.registry.catalogue", "peftcore.authoring.budgets"): "`MethodInfo` counts parameters when it is asked to",
    ("peftcore.injection.applying", "peftcore.files.peft_configs"): "`apply` takes a configuration object of peft",
}
"""Modules above that a text names, to be imported when they are needed, each with its reason. It may shrink."""
LARGEST = 4
"""The number of files in the largest circle of imports, those for types too. It may fall."""

TREE = re.search(r"^```\npeftcore/\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LAYERS = [
    each.removesuffix(".py").rstrip("/") for each in re.findall(r"^  (\S+) ", TREE[1] if TREE else "", re.MULTILINE)
]
"""Packages and loose modules by layer, from the ground up."""
LOOSE = ("errors", "__init__", "__main__")
PACKAGES = [name for name in LAYERS if name not in LOOSE]


def module_of(file: Path) -> str:
    """The dotted name of a file of the core or the lab."""
    parts = file.relative_to(ROOT if file.is_relative_to(CORE) else LAB.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in sorted([*CORE.rglob("*.py"), *LAB.rglob("*.py")])}


def imports(file: Path, types: bool = False) -> Iterator[str]:
    """Every module of the core or the lab that a file imports when it runs, anywhere in it; with `types`, also the
    imports that only type checkers read."""

    def below(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if not types and isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names if alias.name in FILES)
            elif isinstance(child, ast.ImportFrom) and child.module is not None:
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    yield from (name for name in [inner if inner in FILES else child.module] if name in FILES)
            yield from below(child)

    yield from below(ast.parse(file.read_text(encoding="utf-8")))


@cache
def arrows(types: bool = False) -> frozenset[tuple[str, str]]:
    """(importing, imported) module, but for what is deferred on purpose; with `types`, imports for types too."""
    found = {(name, other) for name, file in FILES.items() for other in imports(file, types) if other != name}
    return frozenset((name, other) for name, other in found if not any(_covers(each, name, other) for each in DEFERRED))


def _covers(deferred: tuple[str, str], name: str, other: str) -> bool:
    """Whether an import is one of a deferred package, or of a module in it."""
    return name == deferred[0] and (other == deferred[1] or other.startswith(f"{deferred[1]}."))


def circles() -> list[frozenset[str]]:
    """Groups of modules that import each other, those for types too: from each one all others can be reached."""
    below: dict[str, set[str]] = {name: set() for name in FILES}
    for name, other in arrows(types=True):
        if not other.startswith(f"{name}."):  # a package hands out what its own modules bring
            below[name].add(other)

    def reached(start: str) -> set[str]:
        found, ahead = {start}, [start]
        while ahead:
            new = below[ahead.pop()] - found
            found |= new
            ahead += new
        return found

    from_each = {name: reached(name) for name in FILES}
    groups = {frozenset(each for each in found if name in from_each[each]) for name, found in from_each.items()}
    return sorted(groups, key=lambda circle: (-len(circle), sorted(circle)))


def package(module: str) -> str:
    """The layer of a module: its package, or for the loose ones the module; the lab is one."""
    return LAB.name if module.split(".")[0] == LAB.name else [*module.split("."), "__init__"][1]


def test_every_package_has_its_place_on_the_page() -> None:
    there = [path.parent.name for path in CORE.glob("*/__init__.py")]
    assert sorted(PACKAGES) == sorted(there)
    assert {path.stem for path in CORE.glob("*.py")} == set(LOOSE) <= set(LAYERS)


def test_imports_go_down_between_packages() -> None:
    level = {name: place for place, name in enumerate([*LAYERS, LAB.name])}
    wrong = [
        f"{name} imports {other}"
        for name, other in sorted(arrows(types=True))
        if package(name) != package(other) and level[package(other)] > level[package(name)]
    ]
    assert not wrong


def test_few_modules_know_each_other_as_types() -> None:
    largest = circles()[0]
    assert len(largest) <= LARGEST, f"{len(largest)} modules import each other: {', '.join(sorted(largest))}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, other in arrows():
        if not other.startswith(f"{name}."):  # a package hands out what its own modules bring
            graph.setdefault(name, set()).add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_texts_name_few_modules_above() -> None:
    level = {name: place for place, name in enumerate([*LAYERS, LAB.name])}
    named = {
        (name, other)
        for name, file in FILES.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for other in [node.value.partition(":")[0]]
        if "." in other and other in FILES and level[package(other)] > level[package(name)]
    }
    assert named == set(NAMED)


def test_what_is_deferred_is_there_and_rare() -> None:
    assert len(DEFERRED) <= 2
    for name, other in DEFERRED:
        assert other in set(imports(FILES[name]))


@pytest.mark.parametrize("name", [*PACKAGES, LAB.name])
def test_a_package_says_what_it_is_for_and_in_which_order_to_read_it(name: str) -> None:
    folder, dotted = (LAB, name) if name == LAB.name else (CORE / name, f"peftcore.{name}")
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert "It may import" in text
    inside = {path.stem for path in folder.glob("[!_]*.py")}
    inside |= {path.parent.name for path in folder.glob("*/__init__.py")}
    points = re.findall(r"^- (`\w+`(?:,\s+`\w+`)*): \S", text, re.MULTILINE)
    listed = [name for point in points for name in re.findall(r"\w+", point)]
    assert sorted(listed) == sorted(inside)
    rank = {module: place for place, module in enumerate(listed)}
    for module in inside:  # one reads from what nothing else here needs
        whole = f"{dotted}.{module}."
        for _, other in (arrow for arrow in arrows() if f"{arrow[0]}.".startswith(whole)):
            below = other.removeprefix(f"{dotted}.").split(".")[0]
            if other.startswith(f"{dotted}.") and below != module:
                assert rank[below] < rank[module], f"{module} needs {below}, which is listed after it"


def test_the_test_sees_imports_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "inner.py"
    file.write_text("def late():\n    from peftcore.files import save_load\n    import peftcore.errors\n")
    assert list(imports(file)) == ["peftcore.files.save_load", "peftcore.errors"]


def test_the_test_sees_imports_for_types(tmp_path: Path) -> None:
    file = tmp_path / "typed.py"
    file.write_text("if TYPE_CHECKING:\n    from peftcore.files.save_load import save\n")
    assert list(imports(file)) == [] and list(imports(file, types=True)) == ["peftcore.files.save_load"]
