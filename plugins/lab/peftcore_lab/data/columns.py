"""Finds the columns of a table by their names, and the order of the classes in a column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftcore.errors import BadInput

TEXT_NAMES = ("text", "sentence", "content", "tweet", "review", "body", "message")
LABEL_NAMES = ("label", "labels", "class", "target", "sentiment", "category")


def choose_column(columns: Sequence[str], wanted: str | None, names: Sequence[str], kind: str, path: object) -> str:
    """Return the column that the user named, or else the first of ``names`` that is a column (in upper or lower
    case)."""
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise BadInput(f"{path}: no column {wanted!r}; its columns are {', '.join(columns)}")
    by_name = {column.lower(): column for column in reversed(columns)}
    for name in names:
        if name in by_name:
            return by_name[name]
    raise BadInput(f"{path}: set data.{kind} to the column of the {kind}; its columns are {', '.join(columns)}")


def numbered(labels: Iterable[str], known: Sequence[str], source: object) -> tuple[str, ...]:
    """Return classes in the order of their numbers. If `known` contains the classes of a trained head, it is their
    order. Otherwise integers are ordered by value, and words alphabetically.

    Raises:
        BadInput: the head was trained for other classes.
    """
    found = tuple(sorted(set(labels), key=label_order))
    if not known:
        return found
    if set(known) != set(found):
        pairs = (("the head lacks", set(found) - set(known)), ("no row has", set(known) - set(found)))
        what = " and ".join(f"{words} {', '.join(map(repr, sorted(some)[:4]))}" for words, some in pairs if some)
        raise BadInput(
            f"{source}: the classes differ from the {len(known)} classes of the adapter's head, "
            f"{', '.join(map(repr, known[:4]))}: {what}. Rename the classes of the data, or train a fresh adapter with "
            "--method instead of --adapter"
        )
    return tuple(known)


def label_order(label: str) -> tuple[bool, int, str]:
    number = label.removeprefix("-").isdecimal()
    return (not number, int(label) if number else 0, label)
