"""Examples of several tasks in one table, whose column says which task a row belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from peftcore.errors import BadInput
from peftcore_lab.data.example_sources import ExampleSource, Splits

TASK = "task"
"""The key of an encoded row that has the name of its task, and of a batch that has those of its rows."""


def of_tasks(found: Splits, column: str | None, wanted: Sequence[str]) -> Splits:
    """Return the rows of the tasks that are wanted, or of all; without a column, the given splits.

    Raises:
        BadInput: the column is missing, or a row is without a task; rows to train on are missing for a task that is
            wanted or scored; tasks are wanted, but no column says them.
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
    """Return the names of the tasks, by alphabet."""
    return tuple(sorted({str(name) for name in part[column]}))


def told(rows: Sequence[dict[str, Any]], part: Dataset, column: str | None) -> list[dict[str, Any]]:
    """Return encoded rows, each with the name of its task, if a column says it."""
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
    """Return the rows of some tasks."""
    rows = [
        [row for row, name in enumerate(part[column]) if str(name) in wanted] for part in (found.train, found.held_out)
    ]
    names = found.names[0].selected(rows[0]), found.names[1].selected(rows[1])
    return Splits(found.train.select(rows[0]), found.held_out.select(rows[1]), names)
