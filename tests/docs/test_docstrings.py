"""Every public name says what it is, and which errors of ours it raises.

Public are the names in ``__all__`` of `PACKAGES`, all that has no underscore in `MODULES` and in the plugins, and what
classes of these show. Of errors, a test can see those that a function's own code raises, or that of private functions
of its module that it calls; what comes from further down is for the reader to judge.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest

from peftcore import errors

ROOT = Path(__file__).parents[2]
PACKAGES = ("peftcore", "peftcore.author", "peftcore.author.formats", "peftcore.training", "peftcore.testing")
MODULES = ("errors", "contract.hookspecs", "algebra", "registry.plugins", "registry.equation_only", "files.formats")
PLUGINS = sorted(path.stem for path in ROOT.glob("plugins/*/peftcore_*") if path.stem != "peftcore_lab")
"""Those of methods: the lab is an application, which nothing is written against but its tasks."""
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


class Public(NamedTuple):
    """A class, a function, or (then with its class) what a class defines."""

    value: Any
    owner: type | None = None

    @property
    def texts(self) -> list[str]:
        """Its own docstring first, then those of what it overrides in classes of ours."""
        if self.owner is None:
            return [self.value.__doc__ or ""]
        ours = [vars(cls) for cls in self.owner.__mro__ if cls.__module__.startswith("peftcore")]
        return [each[self.value.__name__].__doc__ or "" for each in ours if self.value.__name__ in each]


def modules(package: str) -> Iterator[ModuleType]:
    """A module or package, and what is in it that any machine can import."""
    root = importlib.import_module(package)
    yield root
    for found in pkgutil.walk_packages(getattr(root, "__path__", ()), f"{package}."):
        if "._" not in found.name and ".backends" not in found.name:
            yield importlib.import_module(found.name)


def public() -> dict[str, Public]:
    """By full name, each once."""
    named = {f"{package}.{key}": vars(sys.modules[package]).get(key) for package in PACKAGES for key in all_of(package)}
    for module in (each for name in (*(f"peftcore.{name}" for name in MODULES), *PLUGINS) for each in modules(name)):
        own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        named |= {f"{module.__name__}.{key}": value for key, value in own.items() if not key.startswith("_")}
    found: dict[str, Public] = {}
    for name, value in {id(value): (name, value) for name, value in reversed(named.items())}.values():
        if isinstance(value, type | FunctionType):
            found[name] = Public(value)
        for key, member in vars(value).items() if isinstance(value, type) else ():
            inner = (
                getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
            )
            if not key.startswith("_") and isinstance(inner, FunctionType) and inner.__name__ == key:
                found[f"{name}.{key}"] = Public(inner, value)
    return found


def all_of(package: str) -> list[str]:
    module = importlib.import_module(package)
    return [key for key in module.__all__ if getattr(module, key, None) is not None]


EVERY = public()


def test_all_are_found() -> None:
    """Otherwise the tests below would hold of nothing."""
    wanted = (
        "peftcore.apply",
        "peftcore.Injection.merge",
        "peftcore.author.Site.path",
        "peftcore.author.ForwardContext.context",
    )
    wanted += ("peftcore.training.MethodOptimizer.step", "peftcore.testing.check_method", "peftcore.errors.MergeError")
    wanted += (
        "peftcore.contract.hookspecs.peftcore_map",
        "peftcore.author.formats.Format.open",
        "peftcore_vision.coop.CoOp",
    )
    wanted += ("peftcore_reparameterized.lora.LoRAOperator.factors",)
    assert not set(wanted) - EVERY.keys()


def test_each_has_a_docstring() -> None:
    assert not [name for name, each in EVERY.items() if not any(each.texts)]


def test_fields_of_the_core_have_one_each() -> None:
    """Below the field, or under "Attributes:" or "Args:" of the class."""
    silent = []
    for name, (value, owner) in EVERY.items():
        if owner is None and isinstance(value, type) and name.rpartition(".")[0] in PACKAGES:
            [node] = ast.parse(inspect.getsource(value)).body
            assert isinstance(node, ast.ClassDef)
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    said = said or re.search(rf"^\s*{field.target.id}: ", value.__doc__ or "", re.MULTILINE) is not None
                    if not said and not field.target.id.startswith("_"):
                        silent.append(f"{name}.{field.target.id}")
    assert not silent


@pytest.mark.parametrize("package", ["peftcore", *PLUGINS])
def test_errors_are_named(package: str) -> None:
    """In the docstring, or in that of the class or of what a function overrides."""
    wrong = []
    for name, each in EVERY.items():
        if name.startswith(f"{package}.") and isinstance(each.value, FunctionType):
            text = " ".join((*each.texts, (each.owner and each.owner.__doc__) or ""))
            wrong += [f"{name} raises {error}" for error in raised(each.value) if not re.search(rf"\b{error}\b", text)]
    assert not wrong


def raised(function: FunctionType) -> set[str]:
    """Errors of ours that its code raises, or that of private functions of its module that it calls."""
    code = inspect.unwrap(function).__code__
    functions = functions_of(code.co_filename)
    starts = [(each, min(line.lineno for line in (each, *each.decorator_list))) for each in functions[code.co_name]]
    left = [each for each, start in starts if start == code.co_firstlineno]
    assert left, f"{function} was not found"
    seen: list[ast.FunctionDef] = []
    found = set()
    while left:
        if (node := left.pop()) in seen:
            continue
        seen.append(node)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call):
                found.add(getattr(inner.exc.func, "id", ""))
            if isinstance(inner, ast.Call):
                called = getattr(inner.func, "id", "") or getattr(inner.func, "attr", "")
                left += (
                    functions.get(called, []) if called.startswith("_") and len(functions.get(called, ())) == 1 else []
                )
    return found & ERRORS


@cache
def functions_of(path: str) -> dict[str, list[ast.FunctionDef]]:
    """The functions of a file, by name."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found
