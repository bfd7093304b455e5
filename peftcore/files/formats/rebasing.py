"""Translates the module paths of an adapter between an encoder without a head and a host that contains the encoder as a
submodule."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from peftcore.errors import HostMismatch


@dataclass(frozen=True)
class Move:
    """The prefix of paths in a file (`old`), and the prefix of the same modules on the host (`new`); at least one is
    empty."""

    old: str = ""
    new: str = ""

    def __call__(self, path: str) -> str:
        """Returns the host's path for a path in the file."""
        if self.old:
            return path.removeprefix(self.old).removeprefix(".")
        return f"{self.new}.{path}".strip(".")

    def covers(self, path: str) -> bool:
        """True if a path in the file starts with the prefix `old`."""
        return not self.old or f"{path}.".startswith(f"{self.old}.")


def find_move(paths: Iterable[str], here: Collection[str], what: str) -> Move:
    """Returns the `Move` that translates the module paths in a file into the host's paths.

    A whole prefix is removed or added, but never replaced by another one, so that an adapter of one tower cannot be
    loaded into another tower.

    Raises:
        HostMismatch: the host lacks the modules, or they fit at several places.
    """
    paths = sorted(set(paths))
    missing = [path for path in paths if path not in here]
    if not missing:
        return Move()
    first = missing[0]
    steps = first.split(".")
    deepest = max((path.count(".") + 1 for path in here), default=0)
    whole = len(steps) + (len(paths) > 1)  # the prefix may be a site too, with others below it
    moves = [Move(old=".".join(steps[:count])) for count in range(max(1, len(steps) - deepest), whole)]
    ending = f".{first}"
    moves += [Move(new=path.removesuffix(ending)) for path in here if path.endswith(ending)]
    fitting = [move for move in moves if all(move.covers(path) and move(path) in here for path in paths)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        places = ", ".join(repr(move.new) for move in fitting)
        raise HostMismatch(f"{what} fits at several places of this host: {places}; load it on one of these submodules")
    raise HostMismatch(
        f"{what} belongs to another base: this model has no {', '.join(missing[:8])}"
        + (f" (and {len(missing) - 8} more)" if len(missing) > 8 else "")
    )
