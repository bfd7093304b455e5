"""The files from which one adapter's training goes on: the adapter itself, as `Injection.save` writes it, and beside it
what its optimizer, its schedule and its method remember, in a file that torch reads without running anything.

A checkpoint is a folder that gets its name when it is whole, and an older one goes after that: a training that is
killed finds one or the other.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import CheckpointError, TrainingError
from peftcore.files.formats.native import TENSORS
from peftcore.files.safe_io import TensorFile
from peftcore.files.save_load import fill
from peftcore.injection.injection import Injection
from peftcore.layers.fsdp import gathered, is_sharded

STATE = "training.pt"
STEP = "step-"
PARTIAL = ".partial"


def newest(folder: Path) -> Path | None:
    """Returns the last checkpoint in a folder; None where there is none."""
    found = [each for each in folder.glob(f"{STEP}*") if each.name.removeprefix(STEP).isdecimal()]
    return max(found, key=lambda each: int(each.name.removeprefix(STEP)), default=None)


def _alone() -> bool:
    """Whether this process shares its training with no others."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def write(injection: Injection, state: Mapping[str, Any], folder: Path, step: int) -> Path:
    """Write a checkpoint, and remove those before it; returns its folder. Of processes that train together all call
    this, and the first one writes.

    Raises:
        TrainingError: torch would not read the state again without running code.
    """
    content = readable(state)
    place = folder / f"{STEP}{step:08d}"
    held = place.exists()
    if not _alone():
        torch.distributed.barrier()  # all have looked before one of them writes
    if held:  # a folder is one training's, so it has what is to be written
        return place
    partial = place.with_name(place.name + PARTIAL)
    first = _alone() or torch.distributed.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    if first or is_sharded(injection.model):  # to gather it takes all of them
        injection.save(partial)
    if first:
        with (partial / STATE).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(place)
        for each in folder.glob(f"{STEP}*"):
            if each != place:
                shutil.rmtree(each, ignore_errors=True)
    if not _alone():
        torch.distributed.barrier()
    return place


def readable(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainingError(
            "the state of the optimizer or the schedule holds objects that torch reads only by running code: use "
            f"those of torch ({' '.join(str(error).split())[:200]})"
        ) from None
    return content


def read(place: Path) -> dict[str, Any]:
    """Returns the state beside an adapter.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(place / STATE, weights_only=True, map_location="cpu")
    except Exception as error:  # of a damaged file torch raises whatever its bytes lead to
        raise CheckpointError(f"{place / STATE} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return state


def values_of(injection: Injection, place: Path) -> dict[str, Tensor]:
    """Returns the values of an adapter in a checkpoint.

    Raises:
        CheckpointError: they are not those of such an adapter, or damaged.
    """
    file = TensorFile(place / TENSORS)
    wanted = {key: each.shape for key, each in injection.state_dict().items()}
    wrong = sorted(key for key, shape in wanted.items() if file.shapes.get(key) != shape)
    if wrong:
        raise CheckpointError(
            f"{place} holds another adapter: {len(wrong)} tensors of {injection.name!r} are missing or of another "
            f"shape in it, such as {wrong[0]}; apply it with the options that it had"
        )
    return file.read(wanted)


def put(injection: Injection, values: Mapping[str, Tensor]) -> None:
    """Give an adapter these values; where it is sharded, all processes do."""
    with gathered(injection.model, injection.parameters):
        fill(injection, values)
