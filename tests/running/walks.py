"""Follows one parameter through the core: which modules it passes through, and how often it climbs.

    python tests/running/walks.py peftcore.injection.applying apply model

Nothing of the core is run. A call is followed where its function is known from imports and definitions: a function or a
class of a module, or a method of `self`. What an object holds of the parameter goes with the object. Each function is
entered once. Error messages and the tools of `utils` are no stops.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = ROOT / "peftcore"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """A file of the core, with its definitions and what it imports from other files of the core."""

    name: str
    tree: ast.Module
    functions: dict[str, Function] = field(default_factory=dict)
    """Functions, and methods as ``Class.method``."""
    classes: set[str] = field(default_factory=set)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By name here: the module that it comes from, and its name there; an empty name for the module itself."""

    def __post_init__(self) -> None:
        for node in self.tree.body:
            if isinstance(node, Function):
                self.functions[node.name] = node
            elif isinstance(node, ast.ClassDef):
                self.classes.add(node.name)
                self.functions |= {f"{node.name}.{each.name}": each for each in node.body if isinstance(each, Function)}


class Tree:
    """All modules of the core."""

    def __init__(self, core: Path = CORE) -> None:
        files = {self._name(file, core.parent): file for file in sorted(core.rglob("*.py"))}
        trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
        self.modules = {name: Module(name, tree) for name, tree in trees.items()}
        self.packages = {name for name, file in files.items() if file.name == "__init__.py"}
        for module in self.modules.values():
            module.imported = dict(self._imports(module.tree))

    @staticmethod
    def _name(file: Path, root: Path) -> str:
        parts = file.relative_to(root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _imports(self, tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
        for node in (each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) and each.module):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in self.modules:
                    yield alias.asname or alias.name, (inner, "")
                elif node.module in self.modules:
                    yield alias.asname or alias.name, (str(node.module), alias.name)

    def defined(self, module: str, name: str) -> tuple[Module, str] | None:
        """Returns the module that defines a name, and the name of the function: ``Class.__init__`` of a class; None
        for what is no function of the core."""
        found = self.modules[module]
        if name in found.functions:
            return found, name
        if name in found.classes:
            return (found, f"{name}.__init__") if f"{name}.__init__" in found.functions else None
        if name in found.imported:
            other, there = found.imported[name]
            return self.defined(other, there) if there else None
        return None

    @cached_property
    def layers(self) -> dict[str, int]:
        """The layer of each module: the place of its package in the list of docs/architecture.md."""
        page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
        tree = page.partition("\npeftcore/\n")[2].partition("\n```")[0]
        listed = [line.split()[0].removesuffix(".py").rstrip("/") for line in tree.splitlines()]
        return {name: listed.index([*name.split("."), "__init__"][1]) + 1 for name in self.modules}


@dataclass
class Walk:
    """The way of a parameter: the modules in the order in which it is in them."""

    tree: Tree
    stays: list[str] = field(default_factory=list)
    entered: set[tuple[str, str, frozenset[str]]] = field(default_factory=set)

    @property
    def rooms(self) -> int:
        """In how many modules it is."""
        return len({*self.stays})

    @property
    def climbs(self) -> int:
        """How often the module that it enters next is of a higher layer than the one before: returns are no entries."""
        layer = self.tree.layers
        return sum(layer[after] > layer[before] for before, after in zip(self.stays, self.stays[1:], strict=False))

    @property
    def returns(self) -> int:
        """How often it comes into a module in which it was before."""
        return len(self.stays) - self.rooms

    def enter(self, module: Module, function: str, held: frozenset[str]) -> None:
        """Follow the parameters `held` through a function."""
        if (module.name, function, held) in self.entered:
            return
        self.entered.add((module.name, function, held))
        self._stay(module.name)
        names = {*held}
        for node in _in_order(module.functions[function].body):
            if isinstance(node, ast.Call):
                self._call(module, function, node, names)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _holds(node.value, names):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
            elif isinstance(node, ast.For | ast.comprehension) and _holds(node.iter, names):
                names |= {each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)}

    def _stay(self, module: str) -> None:
        words_and_tools = module.split(".")[1:2] in (["errors"], ["utils"])
        if not words_and_tools and self.stays[-1:] != [module]:
            self.stays.append(module)

    def _call(self, module: Module, caller: str, node: ast.Call, names: set[str]) -> None:
        found = self._callee(module, caller, node.func)
        if found is None:
            return
        other, function = found
        held = frozenset(_taken(other.functions[function], "." in function, node, names))
        if held:
            self.enter(other, function, held)

    def _callee(self, module: Module, caller: str, called: ast.expr) -> tuple[Module, str] | None:
        if isinstance(called, ast.Name):
            return self.tree.defined(module.name, called.id)
        if not isinstance(called, ast.Attribute) or not isinstance(called.value, ast.Name):
            return None
        owner = called.value.id
        if owner in ("self", "cls") and "." in caller:
            name = f"{caller.partition('.')[0]}.{called.attr}"
            return (module, name) if name in module.functions else None
        if owner in module.imported:
            other, there = module.imported[owner]
            if not there:
                return self.tree.defined(other, called.attr)
            home = self.tree.modules[other]
            return (home, f"{there}.{called.attr}") if f"{there}.{called.attr}" in home.functions else None
        return None


def _in_order(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Yields the nodes of a body in the order in which they run: what a statement reads before what it writes."""
    for node in body:
        yield from _inside(node)


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield from _inside(child)
    yield node


def _holds(value: ast.expr, names: set[str]) -> bool:
    """Whether a value is, or holds, what one of the names holds: the name, an attribute, a container or a call with
    it."""
    return any(isinstance(each, ast.Name) and each.id in names for each in ast.walk(value))


def _taken(function: Function, method: bool, node: ast.Call, names: set[str]) -> Iterator[str]:
    """Yields the parameters of a function for which a call gives what one of the names holds."""
    signature = function.args
    positional = [each.arg for each in (*signature.posonlyargs, *signature.args)][method:]
    for place, value in enumerate(node.args):
        if _holds(value, names):
            if place < len(positional) and not isinstance(value, ast.Starred):
                yield positional[place]
            elif signature.vararg is not None:
                yield signature.vararg.arg
    known = {each.arg for each in (*signature.args, *signature.kwonlyargs)}
    for keyword in node.keywords:
        if _holds(keyword.value, names):
            if keyword.arg in known:
                yield str(keyword.arg)
            elif signature.kwarg is not None:
                yield signature.kwarg.arg


def walk(module: str, function: str, parameter: str, tree: Tree | None = None) -> Walk:
    """Returns the way of a parameter of a function."""
    made = Walk(tree or Tree())
    made.enter(made.tree.modules[module], function, frozenset({parameter}))
    return made


if __name__ == "__main__":
    way = walk(*sys.argv[1:4])
    for number, stay in enumerate(way.stays, 1):
        print(f"{number:4d}  layer {way.tree.layers[stay]:2d}  {stay}")
    print(f"{way.rooms} modules, {way.climbs} climbs, {way.returns} returns")
