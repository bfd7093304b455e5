"""The decorator `against`, by which a test declares the reference code that it compares a method with. The test fails
if it does not use numbers of that code.

    @against("peft 0.21", "dora")
    def test_beside_peft(): ...

    @against("authors", "ssf", repository="dongzelian/SSF", commit="67d6b3a", script="models/vision_transformer.py")
    def test_numbers_of_the_authors():
        numbers = frozen(Path(__file__).parent / "numbers" / "ssf.json")

There are two ways to use such numbers. A function of the declared library returns numbers while the test runs. Or the
test reads frozen numbers: a script has computed them with the reference code, and stored them in a file. Code of the
method has to run in the test too. `gathering` writes the declarations of tests that passed into the file that
`registry.evidence` reads.

By default, a test compares outputs. With another `part` it compares the initial values of a method (``part="start"``),
the set of tensors that train (``"trains"``) or the default options (``"defaults"``). Then it reads the reference values
by ``frozen(path, part)``.

Some libraries cannot be installed together with the others. Their numbers are frozen too, and the declaration then has
a repository, a commit and a script.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import json
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from peftcore.registry.catalogue import method as find_method
from peftcore.registry.evidence import AUTHORS, OTHERS, PARTS, EvidenceRow, Part, Source
from peftcore.testing.failures import CheckFailed

P = ParamSpec("P")
T = TypeVar("T")
FROZEN = ("repository", "commit", "script", "versions")
"""Keys that a file of frozen numbers must have."""
MADE: Mapping[Part, str] = {"outputs": "numbers", "start": "start", "trains": "trains", "defaults": "defaults"}
"""For each part of a method: the name of the function in the script that computes the reference values, which is also
their key in the file."""


@dataclass(frozen=True)
class Declaration:
    """The comparison that a test has declared by `against`."""

    row: EvidenceRow
    methods: tuple[str, ...]
    """Names of the methods; empty if `of` is used."""
    of: str | None = None
    """The name of the argument of the test that contains the method's name."""

    def named(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the names of the methods, given the arguments of the test."""
        return self.methods if self.of is None else (arguments[self.of],)


@dataclass
class _Watch:
    """Records which code runs, and which frozen numbers are read, while a test runs."""

    libraries: tuple[str, ...] = ()
    """Folders of the library that has to return numbers; empty if the test has to read frozen numbers instead."""
    files: set[str] = field(default_factory=set)
    """Files of the declared methods from which no code has run yet."""
    returned: bool = False
    read: list[EvidenceRow] = field(default_factory=list)

    def see(self, frame: FrameType, event: str, result: Any) -> bool:
        """Records a call, or the value that a call returned. Returns whether everything that the test needs has been
        recorded."""
        if event == "call":
            self.files.discard(frame.f_code.co_filename)
        elif event == "return" and not self.returned and frame.f_code.co_filename.startswith(self.libraries):
            self.returned = _numbers(result)
        return not self.files and (self.returned or not self.libraries)


_watches: list[_Watch] = []
"""The records (`_Watch`) of the tests that are running now, one for each declaration of a test."""


def _profile(frame: FrameType, event: str, result: Any) -> None:
    seen = [watch.see(frame, event, result) for watch in _watches]
    if all(seen):
        sys.setprofile(None)


def against(
    source: str,
    *methods: str,
    of: str | None = None,
    repository: str = "",
    commit: str = "",
    script: str = "",
    part: Part = "outputs",
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator that declares that a test compares methods with numbers of reference code. The test fails if it does
    not.

    Args:
        source: the name and version of the library that runs, such as ``"peft 0.21"``; ``"authors"`` for code of the
            paper's authors; or ``"others"`` for code of other people.
        methods: the names of the methods.
        of: instead of `methods`, the name of an argument of a parametrized test; the argument is the method's name.
        repository: the repository of the code, ``"owner/name"``, if the test uses frozen numbers (stored in a file).
            Required for ``"authors"`` and ``"others"``.
        commit: the commit of that repository with which the frozen numbers were computed.
        script: the file in that repository with which the frozen numbers were computed.
        part: the part of the method that is compared. All parts except outputs need frozen numbers.

    Raises:
        ValueError: the declaration is incomplete.
    """
    known, of_no_library = EvidenceRow(Source(source, repository, commit, script), part), source in (AUTHORS, OTHERS)
    places = repository, commit, script
    if not all(places) and (of_no_library or any(places) or part != "outputs"):
        raise ValueError(
            "frozen numbers need a repository, a commit and a script; omit all three for a library of which only "
            "outputs are compared"
        )
    if not of_no_library and len(source.split()) != 2:
        raise ValueError(f"{source!r}: a library is named with the version that is run, such as 'peft 0.21'")
    if bool(methods) is (of is not None):
        raise ValueError("name the methods, or the argument of the test that is a method's name")
    declaration = Declaration(known, methods, of)

    def declare(test: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def watched(*args: P.args, **kwargs: P.kwargs) -> T:
            names = declaration.named(signature.bind(*args, **kwargs).arguments)
            with _watching(known.source, names) as watch:
                result = test(*args, **kwargs)
            _judge(watch, known, names)
            return result

        vars(watched)["declarations"] = (*declarations(test), declaration)
        return watched

    return declare


def declarations(test: Any) -> tuple[Declaration, ...]:
    """Returns the declarations of a test function."""
    found: tuple[Declaration, ...] = getattr(test, "declarations", ())
    return found


def frozen(path: Path, part: Part = "outputs") -> Any:
    """Returns frozen numbers from a file: reference numbers that were computed by a library or by code of a paper's
    authors. The script that computes them must be next to the file, and have the same name.

    Args:
        path: the file.
        part: the part of the method whose reference numbers are returned.

    Raises:
        CheckFailed: the file does not contain the part or the source of its numbers, or the script is not next to it.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if lacking := [key for key in (*FROZEN, MADE[part]) if key not in found]:
        raise CheckFailed(f"{path.name} lacks {', '.join(lacking)}: write it with `python -m peftcore.testing.freeze`")
    if not path.with_suffix(".py").is_file():
        raise CheckFailed(f"{path.name} needs {path.stem}.py next to it, the script that computes its numbers")
    for watch in _watches:
        source = found.get("source", AUTHORS), found["repository"], found["commit"], found["script"]
        watch.read.append(EvidenceRow(Source(*source), part))
    return found[MADE[part]]


def freeze(script: Path, checkout: Path) -> str:
    """Runs a script that computes reference numbers with other code, and returns the text of the file to store them in
    (frozen numbers).

    Args:
        script: the script. It defines `SOURCE`, a `Source`, and `VERSIONS`, the names of the packages whose versions
            are recorded. It also defines at least one of the functions ``numbers(checkout)``, ``start(checkout)``,
            ``trains(checkout)`` and ``defaults(checkout)``, which run the reference code and return JSON values. All
            random number generators are seeded before each function except ``numbers``.
        checkout: a folder with the reference code, at the commit in `SOURCE`.

    Raises:
        CheckFailed: `SOURCE` is a library of which another version is installed, or the script has none of the
            functions.
    """
    module: Any = types.ModuleType(f"frozen_{script.stem}")
    module.__file__ = str(script)
    exec(compile(script.read_bytes(), script, "exec"), vars(module))  # its bytecode may be that of a second ago
    source: Source = module.SOURCE
    if source.name not in (AUTHORS, OTHERS):
        _check_version(source)
    if not any(name in vars(module) for name in MADE.values()):
        raise CheckFailed(f"{script.name} has none of the functions {', '.join(MADE.values())}: write one")
    told = {
        **({} if source.name == AUTHORS else {"source": source.name}),
        "repository": source.repository,
        "commit": source.commit,
        "script": source.script,
        "versions": {name: importlib.metadata.version(name) for name in module.VERSIONS},
    }
    for part in PARTS:
        if (make := vars(module).get(MADE[part])) is not None:
            if part != "outputs":
                _seed()
            told[MADE[part]] = make(checkout)
    return json.dumps(told, indent=1) + "\n"


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@contextmanager
def _watching(source: Source, methods: tuple[str, ...]) -> Iterator[_Watch]:
    watch = _Watch(_folders(source), {inspect.getfile(find_method(name)) for name in methods})
    _watches.append(watch)
    before = sys.getprofile()
    sys.setprofile(_profile)
    try:
        yield watch
    finally:
        sys.setprofile(before)
        _watches.remove(watch)


def _judge(watch: _Watch, row: EvidenceRow, methods: tuple[str, ...]) -> None:
    """Verify that a test has used the numbers that it declared.

    Raises:
        CheckFailed: it has not, or no code of a method ran.
    """
    source = row.source
    if watch.files:
        raise CheckFailed(f"the test says that it compares {', '.join(methods)}, but no code of it ran")
    if source.repository and row not in watch.read:
        raise CheckFailed(
            f"the test says that it compares {row.part} with {source.repository}, but reads no numbers of it: "
            f"read frozen(path, {row.part!r})"
        )
    if not source.repository and not watch.returned:
        raise CheckFailed(f"the test says that it compares with {source}, but no function of it returned numbers")


def _folders(source: Source) -> tuple[str, ...]:
    """Returns the folders of a library that runs in the test; empty for frozen numbers. Raises CheckFailed if the
    installed version is not the declared one."""
    if source.repository:
        return ()
    spec = importlib.util.find_spec(_check_version(source))
    assert spec is not None and spec.submodule_search_locations is not None
    return tuple(f"{place}/" for place in spec.submodule_search_locations)


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Returns the distributions of each installed package. The result is cached, because computing it takes a fifth of
    a second."""
    return importlib.metadata.packages_distributions()


def _check_version(library: Source) -> str:
    """Returns the import name of a library, after verifying that the declared version is installed.

    Raises:
        CheckFailed: another version is installed.
    """
    package, version = library.name.split()
    installed = importlib.metadata.version(_distributions().get(package, [package])[0])
    if not f"{installed}.".startswith(f"{version}."):
        raise CheckFailed(f"{library} is declared, and {installed} is installed: write the version that is run")
    return package


def _numbers(result: Any) -> bool:
    if isinstance(result, Mapping):
        return any(isinstance(each, Tensor) for each in result.values())
    if isinstance(result, list | tuple):
        return any(isinstance(each, Tensor) for each in result)
    return isinstance(result, Tensor)
