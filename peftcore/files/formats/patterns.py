"""Names and regular expressions for modules, as in peft's files. An expression from a file is untrusted, so it gets one
second, and all of a file together get not much more."""

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
"""The time limit, in seconds, of one expression on all paths of a host, and of all expressions of one file."""
LONGEST = 100_000
"""The largest number of characters in an expression."""
GROUPS = 500
"""The largest number of parentheses in an expression: the time to parse nested groups grows with the square of how deep
they are, and no limit ends it."""
_left: ContextVar[list[float] | None] = ContextVar("left", default=None)


@contextmanager
def one_file() -> Iterator[None]:
    """Context manager in which all expressions share their time: a file may have many."""
    with holding(_left, [SECONDS]):
        yield


def matching(pattern: str, paths: Iterable[str], where: Path, *, endings: bool = False) -> set[str]:
    """Returns the paths that match an expression as a whole; with `endings`, also those of which an end after a dot
    does.

    Raises:
        CheckpointError: it is not a regular expression, takes too long, or the package ``regex``, which can stop in
            time, is not installed.
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
    """Returns the paths that are one of the names, or end with one after a dot."""
    names = tuple(names)
    return {path for path in paths if any(path == name or path.endswith(f".{name}") for name in names)}
