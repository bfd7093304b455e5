"""Reads configurations of transformers, diffusers and timm, and finds the classes named in them.

The keys in ``config.json`` determine the library that the file belongs to. Class names in the file are looked up only
among the exports of that library, so a file cannot cause the import of other modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from peftcore.errors import BadInput

T = TypeVar("T")
Reader = TypeVar("Reader")

CONFIG, PIPELINE = "config.json", "model_index.json"


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object, and return the object. Infinities are allowed, because configurations
    of Mamba contain them."""
    if not path.is_file():
        raise BadInput(f"{path.parent}: not a folder of a model; it has no {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path}: does not contain a JSON object")
    return found


def reader_of(readers: Mapping[str, Reader], config: Mapping[str, Any], folder: Path | str) -> Reader:
    """Return the reader for a configuration. `readers` maps a key of the configuration to a reader; the first key that
    the configuration has is used."""
    found = next((reader for key, reader in readers.items() if key in config), None)
    if found is None:
        kinds = "transformers, timm or diffusers"
        raise BadInput(
            f"{folder}: its {CONFIG} does not belong to a model of {kinds}: it has none of the keys "
            f"{', '.join(readers)}"
        )
    return found


def exported(library: ModuleType, name: object, base: type[T]) -> type[T] | None:
    """Return the subclass of `base` that a library exports under the given name; None if it does not export one."""
    found = getattr(library, name) if isinstance(name, str) and name in dir(library) else None
    return found if isinstance(found, type) and issubclass(found, base) else None
