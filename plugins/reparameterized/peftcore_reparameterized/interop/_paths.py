"""Patterns in peft's options, for the types of peft that match a pattern with the whole path of a module or with the
part after a dot."""

from __future__ import annotations

from collections.abc import Collection

from peftcore.errors import ExportError


def path_as_pattern(path: str, paths: Collection[str], option: str) -> str:
    """Return the pattern that matches only the module at `path`.

    Raises:
        ExportError: the pattern matches other modules too.
    """
    if also := [other for other in paths if other.endswith(f".{path}")]:
        raise ExportError(
            f"peft's pattern for the {option} of {path} would also match {also[0]}; use peftcore's own format"
        )
    return path
