"""Finds tasks by name, including those of plugins. The module of a task is imported when the task is needed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftcore.author.formats import imported
from peftcore.errors import BadInput, PluginError
from peftcore.registry.plugins import named_places
from peftcore.utils.packages import require

if TYPE_CHECKING:
    from peftcore_lab.tasks.task import Task


def places() -> Mapping[str, str]:
    """Return the import paths of all task classes, by name of the task.

    Raises:
        PluginError: two plugins have a task with the same name.
    """
    return named_places("peftcore_tasks", "task")


def find(name: str) -> Task[Any]:
    """Return the task with the given name.

    Raises:
        BadInput: the task does not exist, or a package that it needs is missing.
        PluginError: a plugin's task cannot be imported.
    """
    task = kind(name)
    require(task.packages)
    return task()


def kind(name: str) -> type[Task[Any]]:
    """Return the class of a task. The packages that the task needs are not checked.

    Raises:
        BadInput: the name is unknown.
        PluginError: a plugin's task cannot be imported.
    """
    known = places()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise BadInput(f"no task {name!r}; {hint}there are: {', '.join(known)}")
    try:
        found: type[Task[Any]] = imported(known[name])
    except (ImportError, AttributeError) as error:
        raise PluginError(f"task {name!r} at {known[name]} cannot be imported: {error}") from error
    return found
