"""Three parts of the examples: to train on, to choose settings by, and to report."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from peftcore.comparing.data.sources import divide, read, splits
from peftcore.files.safe_io import discard

TUNING, HELD_OUT = "tuning", "held_out"


def parted(
    data: Mapping[str, Any], tuning: str | None, size: int | None, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the data to choose by, and the data to report: the same examples to train on, others to score.

    Where examples have to be held out of those to train on, all parts are written to the folder, once, so that every
    run and every worker has the same.

    Arguments:
      data: what a task is told.
      tuning: examples to choose by, from elsewhere.
      size: without them, how many of those to train on (a fifth, at most 1,000).
      folder: where the parts are put.

    Raises:
        BadInput: one of them cannot be read, or nothing is left to train on.
    """
    rest = {name: value for name, value in data.items() if name != "held_out_size"}
    if tuning is not None and data.get(HELD_OUT) is not None:
        return {**rest, HELD_OUT: tuning}, rest
    if not folder.exists():
        _write(_parts(data, tuning, size), folder)
    places = {name: str(folder / name) for name in ("train", TUNING, HELD_OUT)}
    rest["train"] = places["train"]
    return {**rest, HELD_OUT: places[TUNING]}, {**rest, HELD_OUT: places[HELD_OUT]}


def _parts(data: Mapping[str, Any], tuning: str | None, size: int | None) -> dict[str, Dataset]:
    source = str(data["train"])
    found = splits(source, data.get(HELD_OUT), data.get("held_out_size"))
    if tuning is None:
        cut = divide(found.train, size, source)
        return {"train": cut.train, TUNING: cut.held_out, HELD_OUT: found.held_out}
    other = read(tuning)
    chosen_by = other if isinstance(other, Dataset) else next(iter(other.values()))
    return {"train": found.train, TUNING: chosen_by, HELD_OUT: found.held_out}


def _write(parts: Mapping[str, Dataset], folder: Path) -> None:
    """Write all of the parts or nothing; what another worker has put there meanwhile is the same, and stays."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        for name, part in parts.items():
            part.save_to_disk(str(partial / name))
        if not folder.exists():
            os.rename(partial, folder)
    finally:
        discard(partial)
