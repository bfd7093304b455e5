"""Patterns of those peft types that read a pattern as the path of a module, or as an expression for the part after a
dot."""

from __future__ import annotations

from collections.abc import Collection

from peftcore.errors import ExportError


def path_as_pattern(path: str, paths: Collection[str], option: str) -> str:
    """Return the pattern that means one module.

    Raises:
        ExportError: the pattern matches other modules too.
    """
    if also := [other for other in paths if other.endswith(f".{path}")]:
        raise ExportError(
            f"peft's pattern for the {option} of {path} would also match {also[0]}; use peftcore's own format"
        )
    return path
