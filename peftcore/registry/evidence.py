"""Evidence: which other implementations (sources) a plugin's tests compare its methods with, and which parts of a
method they compare. It is in the file `evidence.json` of the plugin's package.

The file is generated from the plugin's tests (`peftcore.testing.against`). A method without evidence is *equation
only*: its tests compare it only with its equation.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from peftcore.errors import PluginError

FILE = "evidence.json"
"""The name of the evidence file in a plugin's package."""
AUTHORS = "authors"
"""The `Source.name` of code by the authors of the method's paper."""
OTHERS = "others"
"""The `Source.name` of code that is neither a library nor by the authors of the method's paper."""

Part = Literal["outputs", "start", "trains", "defaults"]
"""The part of a method that is compared: its outputs, its initial values, the tensors that it trains, or the defaults
of its options."""
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, order=True)
class Source:
    """Another implementation with whose results tests compare a method."""

    name: str
    """A library with its version, ``"peft 0.21"``; or ``"authors"`` for code by the authors of the paper, or
    ``"others"`` for other code."""
    repository: str = ""
    """The repository of the code, ``"owner/name"``. Set for authors and others, and for a library whose results are
    stored in the tests."""
    commit: str = ""
    """The commit of the repository that was run."""
    script: str = ""
    """The file in the repository whose functions computed the results."""

    def __str__(self) -> str:
        return {AUTHORS: "the authors' code", OTHERS: f"code of {self.repository}"}.get(self.name, self.name)


@dataclass(frozen=True, order=True)
class EvidenceRow:
    """One comparison in the evidence of a method: one source, and one part of the method."""

    source: Source
    part: Part = "outputs"
    """The part that is compared with this source."""

    def __str__(self) -> str:
        return str(self.source) if self.part == "outputs" else f"{self.source}: {self.part}"


Evidence = Mapping[str, tuple[EvidenceRow, ...]]
"""The evidence of a plugin: the comparisons of each method, by the name of the method."""


def sources(location: str, name: str) -> str:
    """Returns the other implementations with which a method's tests compare its outputs or its set of trainable
    tensors, separated by commas. Those that are compared only in initial values or defaults are left out. Empty if
    there are none.

    Args:
        location: the path of the method's class, ``"package.module:Class"``. The package is not imported.
        name: the method's name.

    Raises:
        PluginError: the package's file cannot be read.
    """
    return ", ".join(each for each, found in parts(location, name).items() if {"outputs", "trains"} & {*found})


def parts(location: str, name: str) -> dict[str, tuple[Part, ...]]:
    """Returns the parts of a method that its tests compare with another implementation, by the name of that
    implementation, libraries first.

    The arguments are those of `sources`.

    Raises:
        PluginError: the package's file cannot be read.
    """
    place = folder(location.partition(":")[0].partition(".")[0])
    rows = () if place is None else read(place / FILE).get(name, ())
    words = dict.fromkeys(
        str(each.source) for each in sorted(rows, key=lambda each: (each.source.name in (AUTHORS, OTHERS), each))
    )
    return {
        source: tuple(part for part in PARTS if any(str(row.source) == source and row.part == part for row in rows))
        for source in words
    }


def folder(package: str) -> Path | None:
    """Returns the folder of a package without importing it; None for a single module."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # such as a notebook's __main__
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


@functools.cache
def read(file: Path) -> Evidence:
    """Returns the evidence in a file; empty if the file is missing.

    Raises:
        PluginError: the file does not contain evidence.
    """
    if not file.is_file():
        return {}
    try:
        found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text(encoding="utf-8"))
        return {name: tuple(row for each in sources for row in _rows(**each)) for name, sources in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise PluginError(
            f"{file} is not a valid evidence file: {error}; write it again with `make evidence`"
        ) from error


def _rows(compared: Iterable[Part] = ("outputs",), **source: str) -> list[EvidenceRow]:
    if unknown := set(compared) - set(PARTS):
        raise ValueError(f"{', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}")
    return [EvidenceRow(Source(**source), part) for part in compared]


def written(evidence: Mapping[str, Iterable[EvidenceRow]]) -> str:
    """Returns the JSON text of a file with this evidence. Each source is listed once, with the compared parts if they
    are not only the outputs. Equal evidence gives equal text."""
    return json.dumps({name: _written(set(evidence[name])) for name in sorted(evidence)}, indent=2) + "\n"


def _written(rows: set[EvidenceRow]) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    for source in sorted({row.source for row in rows}):
        compared = [part for part in PARTS if EvidenceRow(source, part) in rows]
        told.append({key: value for key, value in asdict(source).items() if value})
        if compared != ["outputs"]:
            told[-1]["compared"] = compared
    return told
