"""Evidence: with whose numbers the tests of a plugin compare its methods, as the file `evidence.json` in its package
says.

The file is made from tests (`peftcore.testing.against`) and read as data. A method without evidence is *equation only*.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peftcore.errors import PluginError

FILE = "evidence.json"
"""The file's name in a plugin's package."""
AUTHORS = "authors"
"""The source that is no library: the code of a paper's authors."""


@dataclass(frozen=True, order=True)
class Source:
    """A source of numbers that tests compare with."""

    name: str
    """A library with its version, ``"peft 0.21"``; or ``"authors"``."""
    repository: str = ""
    """The repository of the code, ``"owner/name"``: for authors, and for a library whose numbers are frozen."""
    commit: str = ""
    """The commit of the repository that was run."""
    script: str = ""
    """The file of the repository whose functions gave the numbers."""

    def __str__(self) -> str:
        return "the authors' code" if self.name == AUTHORS else self.name


Evidence = Mapping[str, tuple[Source, ...]]
"""Sources by the name of a method."""


def sources(location: str, name: str) -> str:
    """Returns whose numbers the tests of a method compare with, separated by commas; nothing where there is no
    evidence.

    Args:
        location: where the method is, ``"package.module:Class"``; the package is not imported.
        name: the method's name.

    Raises:
        PluginError: the package's file cannot be read.
    """
    place = folder(location.partition(":")[0].partition(".")[0])
    found = () if place is None else read(place / FILE).get(name, ())
    return ", ".join(dict.fromkeys(str(each) for each in sorted(found, key=lambda each: (each.name == AUTHORS, each))))


def folder(package: str) -> Path | None:
    """Returns the folder of a package, which is not imported; None for a single module."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # such as a notebook's __main__
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


@functools.cache
def read(file: Path) -> Evidence:
    """Returns what a file says; nothing where there is none.

    Raises:
        PluginError: it is no such file.
    """
    if not file.is_file():
        return {}
    try:
        found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text(encoding="utf-8"))
        return {name: tuple(Source(**each) for each in sources) for name, sources in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise PluginError(f"{file} is no evidence: {error}; `make evidence` writes it anew") from error


def written(evidence: Mapping[str, Iterable[Source]]) -> str:
    """Returns the text of a file with this evidence, the same for the same evidence."""
    told = {
        name: [{key: value for key, value in asdict(each).items() if value} for each in sorted(set(evidence[name]))]
        for name in sorted(evidence)
    }
    return json.dumps(told, indent=2) + "\n"
