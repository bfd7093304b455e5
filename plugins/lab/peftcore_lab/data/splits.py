"""Three parts of the examples: to train on, to choose settings by, and to report."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from peftcore.errors import BadInput
from peftcore.files.safe_io import discard
from peftcore_lab.data.example_sources import divide, scored, splits
from peftcore_lab.digests import of_content

TUNING, HELD_OUT = "tuning", "held_out"
CUT_FROM = "cut_from.json"
"""The file that says from which examples the parts were cut."""


def parted(
    data: Mapping[str, Any], tuning: str | None, size: int | None, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the data to choose by, and the data to report: the same examples to train on, different ones to score.

    If training examples have to be held out, all parts are written to the folder, once, so that every
    run and every worker has the same.

    Arguments:
      data: the data options of a task.
      tuning: separate examples to choose by.
      size: without `tuning`, the number of training examples to hold out (a fifth, at most 1,000).
      folder: the folder to which the parts are written.

    Raises:
        BadInput: one of them cannot be read, nothing is left to train on, or the folder holds parts of others.
    """
    rest = {name: value for name, value in data.items() if name != "held_out_size"}
    if tuning is not None and data.get(HELD_OUT) is not None:
        return {**rest, HELD_OUT: tuning}, rest
    cut_from = _cut_from(data, tuning, size)
    if not folder.exists():
        _write(_parts(data, tuning, size), folder, cut_from)
    _check_same(folder, cut_from)
    places = {name: str(folder / name) for name in ("train", TUNING, HELD_OUT)}
    rest["train"] = places["train"]
    return {**rest, HELD_OUT: places[TUNING]}, {**rest, HELD_OUT: places[HELD_OUT]}


def _parts(data: Mapping[str, Any], tuning: str | None, size: int | None) -> dict[str, Dataset]:
    source = str(data["train"])
    found = splits(source, data.get(HELD_OUT), data.get("held_out_size"))
    if tuning is None:
        cut = divide(found.train, size, source)
        return {"train": cut.train, TUNING: cut.held_out, HELD_OUT: found.held_out}
    return {"train": found.train, TUNING: scored(tuning), HELD_OUT: found.held_out}


def _cut_from(data: Mapping[str, Any], tuning: str | None, size: int | None) -> dict[str, Any]:
    """Return what decides the parts, with digests of the files."""
    named = {"data.train": data["train"], "data.held_out": data.get(HELD_OUT), "tuning": tuning}
    files = {name: each and (of_content(str(each)) or str(each)) for name, each in named.items()}
    return {**files, "data.held_out_size": data.get("held_out_size"), "tuning_size": size}


def _check_same(folder: Path, cut_from: Mapping[str, Any]) -> None:
    """Check that the parts in a folder are those of these examples.

    Raises:
        BadInput: they are of others, or of others by now.
    """
    file = folder / CUT_FROM
    if not file.exists():  # an older version wrote them
        return
    held = json.loads(file.read_text(encoding="utf-8"))
    if other := [name for name, each in cut_from.items() if held.get(name) != each]:
        raise BadInput(
            f"{folder} holds splits of other data: {', '.join(other)} changed since. Remove the folder, or set --out "
            "to another one"
        )


def _write(parts: Mapping[str, Dataset], folder: Path, cut_from: Mapping[str, Any]) -> None:
    """Write all of the parts or nothing; what another worker has put there meanwhile is the same, and stays."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        for name, part in parts.items():
            part.save_to_disk(str(partial / name))
        (partial / CUT_FROM).write_text(json.dumps(cut_from), encoding="utf-8")
        if not folder.exists():
            os.rename(partial, folder)
    finally:
        discard(partial)
