"""The rules by which one program treats each option and each tensor of an adapter's file, as data.

``rules/`` has a file for each program, with its version, and the repository, commit and source files from which the
rules were read. A program treats a part of a file in one of four ways: it reads the part as it was trained, reads it
differently (*changed*), ignores it with little or no warning (*dropped*), or does not load the file (*refused*).
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
"""Keys of a rule for tensors in addition to the name: the number of dimensions, the size of the first dimension, and
the format of the file."""
BLOCK = re.compile(r"\.(?P<index>\d+)\.(?P<rest>.+)$")
"""Matches the first number in a path, which is the index of the block."""


class Verdict(StrEnum):
    """What a program does with a part of a file. The values are ordered from the best to the worst."""

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
    """Values of an option for which the rule does not apply, since the option then has no effect."""


@dataclass(frozen=True)
class TensorRule:
    """The rule for tensors whose name matches, and optionally also their shape and the file's format."""

    name: re.Pattern[str]
    """A regular expression to search for in the name. The module's path is the text before the group `below`, or before
    the match if there is no such group."""
    rule: Rule
    dims: int | None = None
    """The number of dimensions that the tensor must have; None accepts any number."""
    first: int | None = None
    """The size that the tensor's first dimension must have; None accepts any size."""
    format: str | None = None
    """The format that the file must have; None accepts any format."""

    def fits(self, shape: Sequence[int], format: str) -> bool:
        """True if the rule applies to a tensor of this shape in a file of this format."""
        of_shape = self.dims in (None, len(shape)) and (self.first is None or tuple(shape[:1]) == (self.first,))
        return of_shape and self.format in (None, format)


@dataclass(frozen=True)
class CompanionRule:
    """The rule for a module that is adapted while another module with the same parent is not."""

    module: str
    """The last name of the adapted module's path."""
    wants: str
    """The last name of the other module's path; both have the same parent."""
    rule: Rule
    filled: bool = False
    """True if an export also adapts the other module, with an update of zero."""
    within: re.Pattern[str] = re.compile("")
    """A regular expression to search for in the path of the two modules' parent."""

    def other(self, path: str) -> str | None:
        """Returns the path of the other module for an adapted one; None for modules that need no other."""
        parent, dot, leaf = path.rpartition(".")
        return f"{parent}{dot}{self.wants}" if leaf == self.module and self.within.search(parent) else None


@dataclass(frozen=True)
class SomeBlocks:
    """The rule for a module that is adapted in some blocks, but not in all blocks before the last adapted one."""

    rule: Rule
    filled: bool = False
    """True if an export also adapts the module in the other blocks, with an update of zero."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that a program accepts."""

    most: int
    default: int
    """The largest rank that the program accepts without the flag. 0 means any rank up to `most`."""
    flag: str = ""
    """The flag for larger ranks."""
    sizes: tuple[int, ...] = ()
    """The values that the flag accepts; empty if it accepts any value."""

    def needed(self, rank: int) -> str:
        """Returns the flag with which a server has to be started for this rank; empty if it needs none."""
        if not self.default or rank <= self.default:
            return ""
        return f"{self.flag} {min((size for size in self.sizes if size >= rank), default=rank)}"


@dataclass(frozen=True)
class Reader:
    """One program that reads adapters."""

    name: str
    version: str
    source: str
    """The source code from which the rules were read: ``owner/repository@commit``."""
    files: tuple[str, ...]
    """The source files in that repository; ``path@commit`` for files that were read at another commit."""
    formats: tuple[str, ...]
    """The formats of adapters that the program reads, by peftcore's names."""
    writes: tuple[str, ...]
    """The formats to export an adapter in; the first one that can hold the adapter is used."""
    types: tuple[str, ...]
    """The values of peft's option `peft_type` that the program reads."""
    other_types: Rule
    """The rule for files of types that are neither in `types` nor in `more_types`."""
    options: Mapping[str, Rule]
    """The rules for peft's options, keyed by name."""
    other_options: Rule
    """The rule for options that are not in `options` and are switched on."""
    tensors: tuple[TensorRule, ...]
    """The rules for tensors: the first one that fits is used; the last one fits all tensors."""
    more_types: Mapping[str, Rule] = field(default_factory=dict)
    """The rules for files of types that the program does not support but reads anyway, keyed by type."""
    beside: tuple[CompanionRule, ...] = ()
    some_blocks: SomeBlocks | None = None
    ranks: Ranks | None = None
    notes: tuple[str, ...] = ()
    """Remarks on behaviour that depends on the base or on how the program is started, and not on the file."""

    def tensor(self, name: str, shape: Sequence[int], format: str) -> tuple[str, Rule]:
        """Returns the path of the module to which a tensor belongs, and the rule for the tensor. `format` is the format
        of the file."""
        for each in self.tensors:
            found = each.name.search(name)
            if found is not None and each.fits(shape, format):
                below = "below" if "below" in each.name.groupindex else 0
                return name[: found.start(below)] or name, each.rule
        raise AssertionError(f"the last rule of {self.name} fits all names")

    def lacking(self, adapted: Collection[str], known: Collection[str]) -> list[str]:
        """Returns the modules that an export has to adapt in addition, with an update of zero, so that the program can
        read the adapter.

        Args:
            adapted: the paths of the adapted modules.
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
        """Yields the modules that must be adapted too so that the program reads the modules in `held`."""
        for path in held:
            yield from (other for rule in self.beside if rule.filled and (other := rule.other(path)))


def _kind(path: str) -> tuple[str, str] | None:
    """Returns the parts of a path before and after the index of a block; None if the path has no index."""
    found = BLOCK.search(path)
    return None if found is None else (path[: found.start()], found["rest"])


def readers() -> dict[str, Reader]:
    """Returns the rules of all programs, keyed by the program's name."""
    return dict(_readers())


def reader_named(name: str) -> Reader:
    """Returns the rules of the program with this name.

    Raises:
        ExportError: there are no rules for this program.
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
