"""Tests declare by `against` the reference code with which they compare a method, and fail if they did not use its
numbers.

    @against("peft 0.21", "dora")
    def test_beside_peft(): ...

    @against("authors", "ssf", repository="dongzelian/SSF", commit="67d6b3a", script="models/vision_transformer.py")
    def test_numbers_of_the_authors():
        numbers = frozen(Path(__file__).parent / "numbers" / "ssf.json")

While the test runs, either a function of that library has to return numbers, or the test has to read "frozen" numbers,
which a script computed with that code and stored in a file. Code of the method has to run too. Otherwise the test
fails. `gathering` writes the declarations of passed tests into the file that `registry.evidence` reads.

By default, a test compares outputs. With another `part` it compares a method's initial values (``part="start"``), the
tensors that it trains (``"trains"``) or its default options (``"defaults"``), and reads the reference values by
``frozen(path, part)``.

For a library that cannot be installed together with the others, numbers are frozen as for the code of authors: its
declaration also has a repository, a commit and a script.
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
"""For each part: the name of the script's function that computes it, which is also its key in the file."""


@dataclass(frozen=True)
class Declaration:
    """The comparison that a test declares."""

    row: EvidenceRow
    methods: tuple[str, ...]
    """Names of the methods; empty if an argument of the test is the name."""
    of: str | None = None
    """The argument of the test that is the method's name."""

    def named(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the names of the methods, given the arguments of the test."""
        return self.methods if self.of is None else (arguments[self.of],)


@dataclass
class _Watch:
    """The code that ran, and the frozen numbers that were read, while a test ran."""

    libraries: tuple[str, ...] = ()
    """Folders of the library that has to return numbers; none where frozen ones have to be read."""
    files: set[str] = field(default_factory=set)
    """Files of methods of which no code ran so far."""
    returned: bool = False
    read: list[EvidenceRow] = field(default_factory=list)

    def see(self, frame: FrameType, event: str, result: Any) -> bool:
        """Takes note of a call or of what it returned. Returns whether there is nothing more to see."""
        if event == "call":
            self.files.discard(frame.f_code.co_filename)
        elif event == "return" and not self.returned and frame.f_code.co_filename.startswith(self.libraries):
            self.returned = _numbers(result)
        return not self.files and (self.returned or not self.libraries)


_watches: list[_Watch] = []
"""Watches of the tests that run now; a test has one for each of its declarations."""


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
    """Declare that a test compares methods with reference numbers.

    Args:
        source: the name and version of the library that runs, such as ``"peft 0.21"``; ``"authors"`` for code of the
            paper's authors; or ``"others"`` for code of other people.
        methods: the names of the methods.
        of: instead of `methods`, the argument of a parametrized test that is the method's name.
        repository: for frozen numbers, the repository of the code, ``"owner/name"``; ``"authors"`` and ``"others"``
            always need it.
        commit: for frozen numbers, the commit of the code that computed them.
        script: for frozen numbers, the file in the repository that was used.
        part: the part of the method that is compared; parts other than outputs need frozen numbers.

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
    """Returns frozen numbers, which the authors' code or a library computed, from a file. The script that computes them
    has to be next to the file, with the same name.

    Args:
        path: the file.
        part: the part to read, computed by the script's function of that name; outputs are computed by ``numbers``.

    Raises:
        CheckFailed: the file does not name its source, lacks the part, or has no script with its name next to it.
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
    """Returns the text of a file of frozen numbers, which one of our scripts computes with a checkout of the authors'
    code.

    Args:
        script: a file with `SOURCE`, a `Source`; `VERSIONS`, names of the packages whose versions are recorded; and at
            least one of the functions ``numbers(checkout)``, ``start(checkout)``, ``trains(checkout)`` and
            ``defaults(checkout)``, which run the authors' code and return JSON values. All random number generators are
            seeded before each function except ``numbers``.
        checkout: a folder with the authors' code at the commit that `SOURCE` names.

    Raises:
        CheckFailed: `SOURCE` is a library, and another version of it is installed; or the script has none of the
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
    """Check that what was declared has happened.

    Raises:
        CheckFailed: it has not.
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
    """Returns the folders of a library that is run, for which its version has to be the declared one."""
    if source.repository:
        return ()
    spec = importlib.util.find_spec(_check_version(source))
    assert spec is not None and spec.submodule_search_locations is not None
    return tuple(f"{place}/" for place in spec.submodule_search_locations)


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Returns the distributions of each package that is installed; looking for them takes a fifth of a second."""
    return importlib.metadata.packages_distributions()


def _check_version(library: Source) -> str:
    """Returns the package of a library of which the declared version is installed.

    Raises:
        CheckFailed: another one is.
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
