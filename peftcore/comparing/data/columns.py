"""Columns of a table: which one holds what, and the order of the classes in one."""

from __future__ import annotations

from collections.abc import Sequence

from peftcore.comparing.errors import BadInput

TEXT_NAMES = ("text", "sentence", "content", "tweet", "review", "body", "message")
LABEL_NAMES = ("label", "labels", "class", "target", "sentiment", "category")


def choose_column(columns: Sequence[str], wanted: str | None, names: Sequence[str], kind: str, path: object) -> str:
    """Return the column the user named, or the first whose name is one of ``names`` (in any case)."""
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise BadInput(f"{path}: no column {wanted!r}; its columns are {', '.join(columns)}")
    by_name = {column.lower(): column for column in reversed(columns)}
    for name in names:
        if name in by_name:
            return by_name[name]
    raise BadInput(f"{path}: name the {kind} with data.{kind}; its columns are {', '.join(columns)}")


def label_order(label: str) -> tuple[bool, int, str]:
    number = label.removeprefix("-").isdecimal()
    return (not number, int(label) if number else 0, label)
