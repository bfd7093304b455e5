"""The calls of the system that put files on a disk, in order, and what a power cut could lose of them."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch

Call = tuple[str, str]
"""A kind of call (written, synced, renamed to, made), and the path."""


@contextmanager
def recorded(root: Path) -> Iterator[list[Call]]:
    """The calls below a folder, in order; a rename is noted with both paths."""
    calls: list[Call] = []

    def note(kind: str, path: Any) -> None:
        text = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.abspath(os.fsdecode(path))
        if text.startswith(str(root)):
            calls.append((kind, text))

    def one(name: str, kind: str) -> Callable[..., Any]:
        own = getattr(os, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            found = own(path, *args, **kwargs)
            note(kind, path)
            return found

        return call

    def renaming(name: str) -> Callable[..., Any]:
        own = getattr(os, name)

        def call(old: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
            found = own(old, new, *args, **kwargs)
            note("renamed", old)
            note("renamed to", new)
            return found

        return call

    def opening(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if any(sign in mode for sign in "wxa") and not isinstance(path, int):
                note("written", path)
            return own(path, mode, *args, **kwargs)

        return call

    def writing(own: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if isinstance(args[at], str | os.PathLike):
                note("written", args[at])
            return own(*args, **kwargs)

        return call

    with ExitStack() as stack:
        stack.enter_context(patch.object(os, "mkdir", one("mkdir", "made")))
        stack.enter_context(patch.object(os, "fsync", one("fsync", "synced")))
        for name in ("rename", "replace"):
            stack.enter_context(patch.object(os, name, renaming(name)))
        opened = opening(io.open)
        stack.enter_context(patch.object(io, "open", opened))
        stack.enter_context(patch.object(builtins, "open", opened))
        serialize = safetensors.torch.serialize_file  # type: ignore[attr-defined]
        stack.enter_context(patch.object(safetensors.torch, "serialize_file", writing(serialize, 1)))
        stack.enter_context(patch.object(torch, "save", writing(torch.save, 1)))
        yield calls


def lost(calls: list[Call], files: list[Path]) -> list[str]:
    """What a power cut could lose, of files that are there afterwards, where a file system keeps what was synced and
    renames at once: contents that were not synced before the rename, and names that were not synced after it."""
    found = []
    for file in files:
        path, end = str(file), len(calls)
        while True:  # back through its names
            places = [i for i, (kind, where) in enumerate(calls[:end]) if kind == "renamed to" and _is_at(path, where)]
            begin = places[-1] if places else 0
            wrote = [i for i in range(begin, end) if calls[i] == ("written", path)]
            synced = [i for i in range(begin, end) if calls[i] == ("synced", path)]
            if wrote and not (synced and synced[-1] > wrote[-1]):
                found.append(f"the content of {path}")
            for folder in (Path(path).parent, *Path(path).parent.parents):
                last = [i for i in range(begin, end) if _names(calls[i], path, folder)]
                if last and ("synced", str(folder)) not in calls[last[-1] + 1 :]:
                    found.append(f"the name in {folder} of {path}")
            if not places:
                break
            source, where = calls[begin - 1][1], calls[begin][1]
            path, end = source + path[len(where) :], begin - 1
    return found


def _is_at(path: str, where: str) -> bool:
    return path == where or path.startswith(where + os.sep)


def _names(call: Call, path: str, folder: Path) -> bool:
    """Whether a call puts a name into a folder, that of the file or of a folder above it, which stays there."""
    kind, where = call
    if ".partial" in where:  # a temporary name
        return False
    return kind in ("renamed to", "made") and str(Path(where).parent) == str(folder) and _is_at(path, where)
