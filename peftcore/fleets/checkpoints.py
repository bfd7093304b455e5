"""The files from which one adapter's training goes on: the adapter itself, as `Injection.save` writes it, and beside it
what its optimizer, its schedule and its method remember: tensors as safetensors, the rest as JSON.

A checkpoint is a folder that gets its name when it is whole, and an older one goes after that: a training that is
killed finds one or the other.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import CheckpointError, TrainingError
from peftcore.files.formats.native import TENSORS
from peftcore.files.safe_io import TensorFile, read_json, write_tensors, write_text
from peftcore.files.save_load import fill
from peftcore.injection.injection import Injection
from peftcore.layers.fsdp import gathered, in_group, is_sharded

STATE, STATE_TENSORS = "training.json", "training.safetensors"
_TENSOR, _TUPLE, _PAIRS, _FLOAT = "tensor", "tuple", "pairs", "float"
STEP = "step-"
PARTIAL = ".partial"


def newest(folder: Path) -> Path | None:
    """Returns the last checkpoint in a folder; None where there is none."""
    found = [each for each in folder.glob(f"{STEP}*") if each.name.removeprefix(STEP).isdecimal()]
    return max(found, key=lambda each: int(each.name.removeprefix(STEP)), default=None)


def write(injection: Injection, state: Mapping[str, Any], folder: Path, step: int) -> Path:
    """Write a checkpoint, and remove those before it; returns its folder. Of processes that train together all call
    this, and the first one writes.

    Raises:
        TrainingError: the state is no plain data.
    """
    tensors: dict[str, Tensor] = {}
    told = json.dumps(_split(state, "state", tensors))
    place = folder / f"{STEP}{step:08d}"
    held = place.exists()
    if in_group():
        torch.distributed.barrier()  # all have looked before one of them writes
    if held:  # a folder is one training's, so it has what is to be written
        return place
    partial = place.with_name(place.name + PARTIAL)
    first = not in_group() or torch.distributed.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    if first or is_sharded(injection.model):  # to gather it takes all of them
        injection.save(partial)
    if first:
        write_tensors(partial / STATE_TENSORS, tensors, {})
        write_text(partial / STATE, told)
        partial.rename(place)
        for each in folder.glob(f"{STEP}*"):
            if each != place:
                shutil.rmtree(each, ignore_errors=True)
    if in_group():
        torch.distributed.barrier()
    return place


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a value as JSON has it, with its tensors put aside by path; what JSON does not tell apart is marked.

    Raises:
        TrainingError: it is no plain data.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {_TENSOR: path}
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):  # whose keys may be numbers
        pairs = [[key, _split(each, f"{path}.{n}", tensors)] for n, (key, each) in enumerate(value.items())]
        if all(isinstance(key, int | str) for key, _ in pairs):
            return {_PAIRS: pairs}
    if isinstance(value, list | tuple):
        entries = [_split(each, f"{path}.{n}", tensors) for n, each in enumerate(value)]
        return entries if isinstance(value, list) else {_TUPLE: entries}
    raise TrainingError(
        f"the state of the optimizer or the schedule holds a {type(value).__name__}, which is no plain data: use those "
        "of torch"
    )


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns what `_split` was given."""
    if isinstance(value, list):
        return [_joined(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    ((mark, held),) = value.items()
    if mark == _TENSOR:
        return tensors[held]
    if mark == _FLOAT:
        return float(held)
    if mark == _TUPLE:
        return tuple(_joined(each, tensors) for each in held)
    return {key: _joined(each, tensors) for key, each in held}


def read(place: Path) -> dict[str, Any]:
    """Returns the state beside an adapter.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = TensorFile(place / STATE_TENSORS)
    tensors = file.read(file.shapes)
    try:
        state = _joined(read_json(place / STATE), tensors)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
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
