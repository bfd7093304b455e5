"""Saves and loads a composition of adapters as a folder: each adapter is in a subfolder with its name, and
``composition.json`` describes how they are composed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from peftcore.contract.compositions import KINDS, Composition, branches
from peftcore.errors import CheckpointError, CompositionError
from peftcore.files.safe_io import folder_lock, make_folder, read_json, sync_folder, write_text
from peftcore.files.save_load import load
from peftcore.forward.state.host_state import known
from peftcore.injection.injection import injections
from peftcore.injection.switching import activate
from peftcore.layers.model_locks import changing

FILE = "composition.json"
MOST = 1000
"""The largest number of names, and of branches, that a composition in a file may have. Nested branches could otherwise
multiply without limit."""


def save_composition(model: nn.Module, composition: Composition, path: str | os.PathLike[str]) -> None:
    """Save the adapters of a composition into subfolders of `path` with their names, and the composition itself.

    If the process is killed before the end, the folder lacks ``composition.json``, and `load_composition` says so.

    Raises:
        UnknownInjection: the host has no injection of this name.
    """
    folder = Path(path)
    with changing(model):
        names = list(dict.fromkeys(composition.names()))
        known(model, names)
        make_folder(folder)
        with folder_lock(folder):
            if (folder / FILE).exists():
                (folder / FILE).unlink()
                sync_folder(folder)
            for name in names:
                injections(model)[name].save(folder / name)
            write_text(folder / FILE, json.dumps(_spelled(composition), indent=2) + "\n")


def load_composition(model: nn.Module, path: str | os.PathLike[str]) -> Composition:
    """Load the adapters that `save_composition` wrote, under their names, and activate the composition.

    Raises:
        CheckpointError: `path` has no composition, or a broken one. The errors of `load` may be raised too, for any of
            its adapters. After an error nothing is loaded.
    """
    folder = Path(path)
    with folder_lock(folder, shared=True):
        return _load(model, folder)


def _load(model: nn.Module, folder: Path) -> Composition:
    data = read_json(folder / FILE)
    try:
        composition = _read(data)
        # Names first: each branch holds those before it.
        for what, found in (("names", composition.names()), ("branches", branches([composition]))):
            if sum(1 for _ in islice(found, MOST + 1)) > MOST:
                raise ValueError(f"it has more than {MOST} {what}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, CompositionError) as error:
        raise CheckpointError(f"{folder} cannot be read as a composition: {error}") from None
    with changing(model):
        loaded = []
        try:
            for name in dict.fromkeys(composition.names()):
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise CheckpointError(f"{folder}: {name!r} does not name an adapter inside this folder")
                loaded.append(load(model, folder / name, name=name, active=False))
            activate(model, composition)
        except BaseException:  # on any error nothing stays behind
            for injection in reversed(loaded):
                injection.remove()
            raise
        return composition


def _spelled(part: str | Composition) -> Any:
    if isinstance(part, str):
        return part
    return {"kind": type(part).__name__, "parts": [_spelled(each) for each in part.parts], **part.options}


def _read(data: Mapping[str, Any]) -> Composition:
    options = {key: value for key, value in data.items() if key not in ("kind", "parts")}
    parts = (part if isinstance(part, str) else _read(part) for part in data["parts"])
    return KINDS[data["kind"]](*parts, **options)
