"""Examples of several tasks in one table, with a column for the task of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from peftcore.errors import BadInput
from peftcore_lab.data.example_sources import ExampleSource, Splits

TASK = "task"
"""The key for the name of the task in an encoded row, and for the names of all rows' tasks in a batch."""


def of_tasks(found: Splits, column: str | None, wanted: Sequence[str]) -> Splits:
    """Return splits with only the rows of the tasks in `wanted`, or of all tasks if it is empty. Without a column,
    return the given splits.

    Raises:
        BadInput: the column is missing, a row lacks a task, a wanted or scored task lacks training rows, or tasks are
            wanted without a column.
    """
    if column is None:
        if wanted:
            raise BadInput(
                "data.tasks selects rows by task: set data.task_column to the column with the names of tasks"
            )
        return found
    for source, part in found.named:
        _check(part, column, source)
    known = names_in(found.train, column)
    for name in wanted:
        _one_of(name, known, f"data.tasks={name}")
    if wanted:
        found = _selected(found, column, wanted)
    for name in names_in(found.held_out, column):
        _one_of(name, names_in(found.train, column), f"{found.names[1]}: the task {name}")
    if not len(found.held_out):
        raise BadInput(f"{found.names[1]}: no row belongs to {', '.join(wanted)}")
    return found


def names_in(part: Dataset, column: str) -> tuple[str, ...]:
    """Return the names of the tasks in alphabetical order."""
    return tuple(sorted({str(name) for name in part[column]}))


def told(rows: Sequence[dict[str, Any]], part: Dataset, column: str | None) -> list[dict[str, Any]]:
    """Return encoded rows. If there is a column of tasks, each row also has the name of its task."""
    if column is None:
        return [*rows]
    return [{**row, TASK: str(name)} for row, name in zip(rows, part[column], strict=True)]


def _check(part: Dataset, column: str, source: ExampleSource) -> None:
    if column not in part.column_names:
        raise BadInput(f"{source}: no column {column!r}; its columns are {', '.join(part.column_names)}")
    for index, name in enumerate(part[column]):
        if name is None or not str(name).strip():
            raise BadInput(f"{source.row(index)} has no task in the column {column}")


def _one_of(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        raise BadInput(f"{what} has no row to train on; the training rows have the tasks {', '.join(known)}")


def _selected(found: Splits, column: str, wanted: Sequence[str]) -> Splits:
    """Return splits with only the rows of the tasks in `wanted`."""
    rows = [
        [row for row, name in enumerate(part[column]) if str(name) in wanted] for part in (found.train, found.held_out)
    ]
    names = found.names[0].selected(rows[0]), found.names[1].selected(rows[1])
    return Splits(found.train.select(rows[0]), found.held_out.select(rows[1]), names)
