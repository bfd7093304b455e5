"""Which defaults no test holds: each default of each method's options is changed once, and the method's own tests run:
its test file without the conformance kit, and its rows in the plugin's `test_defaults.py`. What still passes is
printed; the exit status is 1 if there is any. Defaults that the plugin's table `FREE` names are left alone, since
nothing fixes them.

    python tests/running/held_defaults.py [METHOD ...]

What was found is kept in `.held_defaults.json`, by a digest of the files that it depends on, so that a second run takes
those alone that changed.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

import peftcore
from peftcore.author import MethodConfig
from peftcore.utils.progress import through

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".held_defaults.json"
COMMON = {*MethodConfig.model_fields, "method"}
"""Options that are no method's own."""


def tests_of(info: peftcore.MethodInfo) -> tuple[Path, Path]:
    """Returns a method's own test file, and that in which its plugin holds defaults."""
    tests = ROOT / f"plugins/{info.plugin}/tests"
    return tests / f"test_{info.name}.py", tests / "test_defaults.py"


def files_of(info: peftcore.MethodInfo) -> list[Path]:
    """Returns the files on which a method's own tests depend: its own, what its plugin shares, and its test files."""
    package = ROOT / f"plugins/{info.plugin}/peftcore_{info.plugin}"
    own = ROOT / f"plugins/{info.plugin}/{info.location.partition(':')[0].replace('.', '/')}"
    files = sorted(own.glob("*.py")) if own.is_dir() else [own.with_suffix(".py")]
    return [*files, *sorted(package.glob("_*.py")), *tests_of(info), ROOT / "tests/toys/named_defaults.py"]


def free(info: peftcore.MethodInfo) -> set[str]:
    """Returns the options whose defaults nothing fixes, as the table `FREE` of the plugin says; it is all literals."""
    for node in ast.parse(tests_of(info)[1].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "FREE":
            assert node.value is not None
            return {option for method, option in ast.literal_eval(node.value) if method == info.name}
    raise LookupError(f"{tests_of(info)[1]} has no table FREE")


def digest(files: list[Path]) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def others(config: type[MethodConfig], option: str) -> Iterator[Any]:
    """Yields values that an option may have in place of its default, the nearest first."""
    field = config.model_fields[option]
    default = field.default
    for kind in _kinds(field.annotation):
        if get_origin(kind) is Literal:
            yield from (value for value in get_args(kind) if value != default)
    if isinstance(default, bool):
        yield not default
    elif isinstance(default, int | float):
        yield from (2 * default, default + 1, default // 2 if isinstance(default, int) else default / 2, 0.1, 1)
    elif default is None:
        yield from (1, 2, 0.5, True, "relu", [0])
    elif isinstance(default, str):
        yield "relu"
    elif isinstance(default, tuple | list):
        yield type(default)(default[:-1])


def _kinds(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield annotation
    for inside in get_args(annotation):
        yield from _kinds(inside)


def other(config: type[MethodConfig], option: str) -> Any:
    """Returns the first other value that the option takes; raises LookupError where there is none."""
    default = config.model_fields[option].default
    for value in others(config, option):
        try:
            taken = getattr(config(**{option: value}), option)
        except ValidationError:
            continue
        if taken != default or type(taken) is not type(default):
            return taken
    raise LookupError(option)


class WithoutKit:
    """A plugin of pytest that leaves the kit out."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if not item.name.startswith("test_conformance")]


def survives(info: peftcore.MethodInfo) -> bool:
    """Whether a method's own tests pass, as things are; those that are quick come first."""
    own, defaults = tests_of(info)
    mine = f"{own.name} or [{info.name}."
    with redirect_stdout(io.StringIO()):
        arguments = [str(defaults), str(own), "-k", mine, "-x", "-q", "-p", "no:cacheprovider"]
        status = pytest.main(arguments, plugins=[WithoutKit()])
    return status == 0


def survivors(name: str) -> dict[str, Any]:
    """Returns the other values, by option, with which a method's own tests pass."""
    info = next(info for info in peftcore.methods() if info.name == name)
    config = peftcore.method(name).Config
    if not survives(info):
        raise SystemExit(f"tests of {name} fail as they are")
    found = {}
    for option, field in config.model_fields.items():
        if option in COMMON | free(info) or field.is_required() or field.default_factory is not None:
            continue
        default = field.default
        try:
            field.default = other(config, option)
        except LookupError:
            if default is not None:  # where it is, others are names of what a user has
                found[option] = "no other value is known"
            continue
        config.model_rebuild(force=True)
        if survives(info):
            found[option] = f"{default!r} -> {field.default!r}"
        field.default = default
        config.model_rebuild(force=True)
    return found


def main(names: list[str]) -> int:
    ours = [i for i in peftcore.methods() if (ROOT / f"plugins/{i.plugin}").is_dir() and (not names or i.name in names)]
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for info in through(ours, "methods"):
        sign = digest(files_of(info))
        if kept.get(info.name, {}).get("digest") != sign:
            told = subprocess.run(
                [sys.executable, __file__, "--one", info.name], capture_output=True, text=True, check=False, cwd=ROOT
            )
            if told.returncode:
                raise SystemExit(f"{info.name}: {told.stdout}{told.stderr}")
            kept[info.name] = {"digest": sign, "survivors": json.loads(told.stdout.splitlines()[-1])}
            KEPT.write_text(json.dumps(kept, indent=1))
    lines = [f"{i.name}.{o}: {how}" for i in ours for o, how in kept[i.name]["survivors"].items()]
    left = sum(len(free(info)) for info in ours)
    print("\n".join([*lines, f"{len(lines)} defaults of {len(ours)} methods are held by no test"]))
    print(f"{left} more were left alone: nothing fixes them (FREE in plugins/*/tests/test_defaults.py)")
    return 1 if lines else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(survivors(sys.argv[2])))
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
