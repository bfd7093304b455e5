"""The rules by which one program treats each option and each tensor of an adapter's file, as data.

``rules/`` has a file for each program, with the version, the repository, the commit and the files in which it was read.
A program treats a part of a file in one of four ways: it reads it as it was trained, reads something else from it
(*changed*), continues without it and says little or nothing (*dropped*), or does not load the file (*refused*).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peftcore.errors import ExportError

RULES = Path(__file__).parent / "rules"
WHERE = ("dims", "first", "format")
"""Keys of a rule of tensors in addition to the name: number of dimensions, size of the first one, format of the
file."""
BLOCK = re.compile(r"\.(?P<index>\d+)\.(?P<rest>.+)$")
"""The first number in a path, which is that of the block."""


class Verdict(StrEnum):
    """The verdict on a part of a file, from the best to the worst."""

    READ = "read"
    CHANGED = "changed"
    DROPPED = "dropped"
    REFUSED = "refused"


@dataclass(frozen=True)
class Rule:
    """The verdict on one part of a file, and the reason."""

    verdict: Verdict
    why: str = ""
    but: tuple[Any, ...] = ()
    """Values of an option with which it changes nothing, and is read."""


@dataclass(frozen=True)
class TensorRule:
    """The rule for tensors with a name, and perhaps a shape and a file format."""

    name: re.Pattern[str]
    """An expression that is found in the name. The text before its group `below`, or of what it finds, is the
    module's path."""
    rule: Rule
    dims: int | None = None
    """The number of dimensions that a tensor must have for the rule; None: any."""
    first: int | None = None
    """The size that its first dimension must have; None: any."""
    format: str | None = None
    """The format of the files that it is for; None: any."""

    def fits(self, shape: Sequence[int], format: str) -> bool:
        """Whether a tensor of a shape in a file of a format is one that the rule is for."""
        of_shape = self.dims in (None, len(shape)) and (self.first is None or tuple(shape[:1]) == (self.first,))
        return of_shape and self.format in (None, format)


@dataclass(frozen=True)
class CompanionRule:
    """The rule for a module that is adapted without another one next to it."""

    module: str
    """The last name of its path."""
    wants: str
    """The last name of the other module's path; both have the same parent."""
    rule: Rule
    filled: bool = False
    """Whether an export adapts the other too, by an update of zero."""
    within: re.Pattern[str] = re.compile("")
    """An expression that is found in the path of the module that has both."""

    def other(self, path: str) -> str | None:
        """Returns the path of the other of a module that is adapted; None for a module that needs none."""
        parent, dot, leaf = path.rpartition(".")
        return f"{parent}{dot}{self.wants}" if leaf == self.module and self.within.search(parent) else None


@dataclass(frozen=True)
class SomeBlocks:
    """The rule for a module that is adapted in some blocks and not in others before the last one."""

    rule: Rule
    filled: bool = False
    """Whether an export adapts it in the others too, by an update of zero."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that a program takes."""

    most: int
    default: int
    """The largest that it takes without the flag; 0: any up to `most`."""
    flag: str = ""
    """The flag by which the program is given a larger rank."""
    sizes: tuple[int, ...] = ()
    """The values that the flag takes; empty: any."""

    def needed(self, rank: int) -> str:
        """Returns the flag with which a server has to be started for a rank; empty where it needs none."""
        if not self.default or rank <= self.default:
            return ""
        return f"{self.flag} {min((size for size in self.sizes if size >= rank), default=rank)}"


@dataclass(frozen=True)
class Reader:
    """One program that reads adapters."""

    name: str
    version: str
    source: str
    """Where its code was read: ``owner/repository@commit``."""
    files: tuple[str, ...]
    """The files there; ``path@commit`` was read at a separate commit."""
    formats: tuple[str, ...]
    """The formats of adapters that it reads, by our names."""
    writes: tuple[str, ...]
    """The formats in which it is given an adapter: the first that can hold it."""
    types: tuple[str, ...]
    """Types of peft that it reads."""
    other_types: Rule
    """The rule for files of types that are neither in `types` nor in `more_types`."""
    options: Mapping[str, Rule]
    """The rules for peft's options, by name."""
    other_options: Rule
    """The rule for options that are not in `options` and are on."""
    tensors: tuple[TensorRule, ...]
    """The first that fits counts; the last one fits all."""
    more_types: Mapping[str, Rule] = field(default_factory=dict)
    """The rules for files of some types that it does not know and reads all the same, by type."""
    beside: tuple[CompanionRule, ...] = ()
    some_blocks: SomeBlocks | None = None
    ranks: Ranks | None = None
    notes: tuple[str, ...] = ()
    """Remarks on what depends on the base or on how the program is started, so that no file determines it."""

    def tensor(self, name: str, shape: Sequence[int], format: str) -> tuple[str, Rule]:
        """Returns the module's part of the name of a tensor in a file of a format, and the rule for the tensor."""
        for each in self.tensors:
            found = each.name.search(name)
            if found is not None and each.fits(shape, format):
                below = "below" if "below" in each.name.groupindex else 0
                return name[: found.start(below)] or name, each.rule
        raise AssertionError(f"the last rule of {self.name} fits all names")

    def lacking(self, adapted: Collection[str], known: Collection[str]) -> list[str]:
        """Returns the modules of a model that an export has to adapt too, by an update of zero, so that the program
        reads those that are adapted.

        Args:
            adapted: the paths of these.
            known: the paths of all modules of the model.
        """
        held = dict.fromkeys(adapted)
        while more := [path for path in self._wanted(held) if path not in held and path in known]:
            held |= dict.fromkeys(more)
        if self.some_blocks is not None and self.some_blocks.filled:
            kinds = {_kind(path) for path in held} - {None}
            held |= dict.fromkeys(path for path in known if _kind(path) in kinds)
        return [path for path in held if path not in adapted]

    def _wanted(self, held: Iterable[str]) -> Iterator[str]:
        """Yields the modules beside which the program reads those that are adapted."""
        for path in held:
            yield from (other for rule in self.beside if rule.filled and (other := rule.other(path)))


def _kind(path: str) -> tuple[str, str] | None:
    """Returns what is in front of the number of a block in a path and what is behind it; None where it has none."""
    found = BLOCK.search(path)
    return None if found is None else (path[: found.start()], found["rest"])


def readers() -> dict[str, Reader]:
    """Returns all programs by name."""
    return dict(_readers())


def reader_named(name: str) -> Reader:
    """Returns one program.

    Raises:
        ExportError: no rules say what it reads.
    """
    known = _readers()
    if name not in known:
        raise ExportError(f"there are no rules for the program {name!r}; there are rules for {', '.join(known)}")
    return known[name]


@cache
def _readers() -> Mapping[str, Reader]:
    found = (_parsed(path) for path in sorted(RULES.glob("*.toml")))
    return MappingProxyType({each.name: each for each in found})


def _parsed(path: Path) -> Reader:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    options = {name: _rule(value) for name, value in data.pop("options", {}).items()}
    options |= dict.fromkeys(data.pop("read_options", []), Rule(Verdict.READ))
    tensors = [
        TensorRule(
            re.compile(each.pop("name")), **{key: each.pop(key) for key in WHERE if key in each}, rule=_rule(each)
        )
        for each in data.pop("tensors")
    ]
    beside = [_beside(each) for each in data.pop("beside", [])]
    blocks = data.pop("some_blocks", None)
    ranks = data.pop("ranks", None)
    return Reader(
        files=tuple(data.pop("files")),
        formats=tuple(data.pop("formats")),
        writes=tuple(data.pop("writes")),
        types=tuple(data.pop("types", [])),
        other_types=_rule(data.pop("other_types")),
        more_types=MappingProxyType({name: _rule(value) for name, value in data.pop("more_types", {}).items()}),
        options=MappingProxyType(options),
        other_options=_rule(data.pop("other_options")),
        tensors=tuple(tensors),
        beside=tuple(beside),
        some_blocks=None if blocks is None else SomeBlocks(filled=blocks.pop("filled", False), rule=_rule(blocks)),
        ranks=None if ranks is None else Ranks(sizes=tuple(ranks.pop("sizes", [])), **ranks),
        notes=tuple(data.pop("notes", [])),
        **data,
    )


def _beside(data: dict[str, Any]) -> CompanionRule:
    within = re.compile(data.pop("within", ""))
    own = {key: data.pop(key) for key in ("module", "wants", "filled") if key in data}
    return CompanionRule(**own, within=within, rule=_rule(data))


def _rule(data: Mapping[str, Any]) -> Rule:
    """Returns the rule in ``{VERDICT = "why", but = [...]}``."""
    left = dict(data)
    but = tuple(left.pop("but", ()))
    [(verdict, why)] = left.items()
    return Rule(Verdict(verdict), why, but)
