"""Three splits of the examples: for training, for choosing settings (tuning), and for the reported scores."""

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
"""The file that records from which examples the splits were made."""


def parted(
    data: Mapping[str, Any], tuning: str | None, size: int | None, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two data options of a task, for choosing settings and for the report. Both have the same training examples
    and different examples to score.

    If training examples have to be held out, all splits are written to the folder once, so that they are the same for
    every run and every worker.

    Arguments:
      data: the data options of a task.
      tuning: separate examples for choosing settings.
      size: without `tuning`, the number of training examples to hold out (a fifth, at most 1,000).
      folder: the folder to which the splits are written.

    Raises:
        BadInput: examples cannot be read, none is left to train on, or the folder contains splits of other examples.
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
    """Return the settings that determine the splits, with digests of the files."""
    named = {"data.train": data["train"], "data.held_out": data.get(HELD_OUT), "tuning": tuning}
    files = {name: each and (of_content(str(each)) or str(each)) for name, each in named.items()}
    return {**files, "data.held_out_size": data.get("held_out_size"), "tuning_size": size}


def _check_same(folder: Path, cut_from: Mapping[str, Any]) -> None:
    """Check that the splits in a folder were made from these examples.

    Raises:
        BadInput: they were made from other examples, or the examples have changed.
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
    """Write all splits, or none if an error occurs. If another worker has written the folder meanwhile, its splits are
    the same and are kept."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        for name, part in parts.items():
            part.save_to_disk(str(partial / name))
        (partial / CUT_FROM).write_text(json.dumps(cut_from), encoding="utf-8")
        if not folder.exists():
            os.rename(partial, folder)
    finally:
        discard(partial)
