"""Reads the public API: names with their signatures, and the imports that pages and examples show.

``python tests/api/make_snapshot.py`` adds names that are new to snapshot.json beside it, and leaves what is recorded.
With ``--anew`` it writes all of it, which is done for a release alone: what is recorded may not break within a minor
version.

An entry of "names" has a kind: "function", "class" or "constant". A function has parameters, each [name, kind, repr of
the default or null]. A class has members of its own and of base classes of peftcore (methods, and values: properties,
fields, class attributes), the public classes that it inherits from, and parameters where peftcore defines `__init__`.
Annotations are not recorded: how they are spelled depends on modules.
"""

import functools
import importlib
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("snapshot.json")
MODULES = (
    "peftcore",
    "peftcore.author",
    "peftcore.author.formats",
    "peftcore.testing",
    "peftcore.training",
    "peftcore.errors",
)
NAME = r"\w+(?: as \w+)?"
FROM = re.compile(rf"\bfrom (peftcore(?:\.\w+)*) import (?:\(([^)]*)\)|({NAME}(?:, *{NAME})*))")
IMPORT = re.compile(r"\bimport (peftcore(?:\.\w+)*)\b")
DOTTED = re.compile(r"\b(peftcore(?:\.[a-z_]+)+)\.(\w+)")
Described = dict[str, Any]


def public() -> dict[str, Any]:
    """Each public object by its full name."""
    found = {}
    for path in MODULES:
        module = importlib.import_module(path)
        names = getattr(module, "__all__", None) or _classes_of(module)
        found |= {f"{path}.{name}": getattr(module, name) for name in names}
    return found


def _classes_of(module: Any) -> list[str]:
    """The public classes that a module without a list of names defines."""
    return [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and not name.startswith("_") and value.__module__.startswith(module.__name__)
    ]


def described(value: Any, names: Mapping[str, Any]) -> Described:
    """What is recorded of one object; `names` are all public ones."""
    if inspect.isclass(value):
        ours = [each for each in value.__mro__ if each.__module__.split(".")[0] == "peftcore"]
        bases = [name for name, each in names.items() if each is not value and each in value.__mro__]
        members: dict[str, Described] = {}
        for cls in reversed(ours):
            members |= {name: {"kind": "value"} for name in inspect.get_annotations(cls)}
            members |= {name: _member(each) for name, each in vars(cls).items()}
        shown = {name: members[name] for name in sorted(members) if not name.startswith(("_", "model_config"))}
        made = {"parameters": parameters(value)} if any("__init__" in vars(cls) for cls in ours) else {}
        return {"kind": "class", "bases": sorted(bases), **made, "members": shown}
    if callable(value) and not typing.get_origin(value):  # an alias of types can be called, and has no signature
        return {"kind": "function", "parameters": parameters(value)}
    return {"kind": "constant", "type": type(value).__name__}


def _member(value: Any) -> Described:
    if isinstance(value, classmethod | staticmethod):
        return {"kind": type(value).__name__, "parameters": parameters(value.__func__)}
    if inspect.isfunction(value):
        return {"kind": "method", "parameters": parameters(value)}
    return {"kind": "value"}


def parameters(function: Any) -> list[list[str | None]]:
    """Name, kind and default of each parameter."""
    return [
        [each.name, each.kind.name.lower(), None if each.default is each.empty else _default(each.default)]
        for each in inspect.signature(function).parameters.values()
    ]


def _default(value: Any) -> str:
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__name__
    return repr(value)


def pages() -> Iterable[Path]:
    """What users and authors read, and what makes it."""
    yield from (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
    yield from (path for path in sorted(ROOT.glob("docs/**/*.md")) if "decisions" not in path.parts)
    for pattern in ("plugins/*/README.md", "examples/**/*.md", "examples/**/*.py", "docs/generate/*.py"):
        yield from sorted(ROOT.glob(pattern))


def imports(text: str, prose: bool) -> set[str]:
    """The import statements of ours in a text, one for each name; in `prose` also dotted names in backticks."""
    found = {f"import {module}" for module in IMPORT.findall(text)}
    for module, several, few in FROM.findall(text):
        names = (each.partition(" as ")[0].strip() for each in re.sub("#.*", "", several or few).split(","))
        found |= {f"from {module} import {name}" for name in names if name}
    if prose:
        found |= {each for pair in DOTTED.findall(text) if works(each := "from {} import {}".format(*pair))}
    return found


@functools.cache
def works(statement: str) -> bool:
    """Whether an import statement finds its module and its name."""
    try:
        exec(statement, {})
    except ImportError:
        return False
    return True


def snapshot() -> dict[str, Any]:
    """Everything that is recorded: names, and which pages show which import."""
    names, shown = public(), {}
    for path in pages():
        for each in imports(path.read_text(encoding="utf-8"), path.suffix == ".md"):
            shown.setdefault(each, []).append(path.relative_to(ROOT).as_posix())
    return {
        "names": {name: described(names[name], names) for name in sorted(names)},
        "imports": {each: shown[each] for each in sorted(shown)},
    }


def text(recorded: dict[str, Any]) -> str:
    """As JSON in which lists of plain values stand on one line."""
    spread = json.dumps(recorded, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), spread) + "\n"


if __name__ == "__main__":
    recorded = {} if "--anew" in sys.argv[1:] else json.loads(FILE.read_text(encoding="utf-8"))
    now = snapshot()
    FILE.write_text(
        text({part: dict(sorted({**now[part], **recorded.get(part, {})}.items())) for part in now}), encoding="utf-8"
    )
