"""Matches module paths with names and regular expressions, as in peft's files. Expressions in files are untrusted, so
matching all expressions of a file has a time limit of one second."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from peftcore.errors import CheckpointError, shown
from peftcore.utils.variables import holding

SECONDS = 1.0
"""The time limit in seconds: for one expression on all paths of a host, and for all expressions of one file."""
LONGEST = 100_000
"""The largest number of characters in an expression."""
GROUPS = 500
"""The largest number of opening parentheses in an expression: the time to parse nested groups grows with the square of
their depth, and the time limit does not apply to parsing."""
_left: ContextVar[list[float] | None] = ContextVar("left", default=None)


@contextmanager
def one_file() -> Iterator[None]:
    """Context manager in which all expressions share one time limit, since a file may have many."""
    with holding(_left, [SECONDS]):
        yield


def matching(pattern: str, paths: Iterable[str], where: Path, *, endings: bool = False) -> set[str]:
    """Returns the paths that a regular expression matches completely. With `endings`, it is enough that it matches the
    part after one of the dots.

    Raises:
        CheckpointError: the pattern is not a regular expression, or takes too long; or the package ``regex`` is not
            installed, which is needed for the time limit.
    """
    if re.fullmatch(r"[\w.-]+", pattern):  # a name: its dots are meant as dots
        return {path for path in paths if path == pattern or (endings and path.endswith(f".{pattern}"))}
    try:
        import regex
    except ImportError:
        raise CheckpointError(
            f"{where} has the regular expression {pattern!r}, which peftcore matches within a time limit: "
            "pip install regex"
        ) from None
    if len(pattern) > LONGEST:
        raise CheckpointError(
            f"{where}: {shown(pattern)} cannot be matched: it has {len(pattern):,} characters, more than {LONGEST}"
        )
    if pattern.count("(") > GROUPS:
        raise CheckpointError(
            f"{where}: {shown(pattern)} cannot be matched: it has {pattern.count('('):,} groups, more than {GROUPS}"
        )
    left = _left.get() or [SECONDS]
    found, start = set(), time.monotonic()
    try:
        if left[0] <= 0:  # each by itself may be quick; reading so many is not
            raise TimeoutError("the expressions before it in the file used up the time limit")
        re.compile(pattern)  # the extensions of `regex` (recursion) mean nothing to peft
        compiled = regex.compile(rf"(?:.*\.)?(?:{pattern})" if endings else pattern)
        for path in paths:
            if compiled.fullmatch(path, timeout=max(left[0] + start - time.monotonic(), 1e-3)):
                found.add(path)
    except (re.error, regex.error, TimeoutError, OverflowError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{where}: {shown(pattern)} cannot be matched: {error}") from None
    left[0] -= time.monotonic() - start
    return found


def ending(paths: Iterable[str], names: Iterable[str]) -> set[str]:
    """Returns the paths that are equal to one of the names, or end with a dot and one of the names."""
    names = tuple(names)
    return {path for path in paths if any(path == name or path.endswith(f".{name}") for name in names)}
