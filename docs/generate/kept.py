"""What takes long to find out is kept in `build/`, as long as the code that says it is the same."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peftcore

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/docs-kept"
LIBRARIES = ("torch", "transformers", "diffusers")
"""Whose models are planned."""


def kept(what: str, find: Callable[[], Any], *sources: Path) -> Any:
    """What `find` returns, plain data: found once, as long as the core and `sources`, files or folders, are as they
    are."""
    key = hashlib.sha256("".join([_core(), *map(_digest, sources)]).encode()).hexdigest()[:16]
    file = FOLDER / f"{what}-{key}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    found = find()
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob(f"{what}-{'?' * len(key)}.json"):
        old.unlink()
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


@functools.cache
def _core() -> str:
    return "".join([*map(importlib.metadata.version, LIBRARIES), _digest(Path(peftcore.__file__).parent)])


@functools.cache
def _digest(place: Path) -> str:
    """Of a file, or of all sources below a folder but for the kit, and the command line with its library."""
    sources = [place] if place.is_file() else sorted(place.rglob("*.py"))
    told = [each for each in sources if not {"testing", "cli"} & set(each.relative_to(place).parts)]
    return hashlib.sha256(b"".join(each.read_bytes() for each in told)).hexdigest()
