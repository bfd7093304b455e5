"""Checkpoints from which the training of one adapter continues. A checkpoint has the adapter, as `Injection.save`
writes it, and the states of its optimizer, its schedule and its method. Tensors are stored as safetensors, the rest as
JSON.

A checkpoint is a folder that gets its final name when it is complete. Older checkpoints are removed after that, so a
complete checkpoint exists even if the training is killed. The folder that contains the checkpoints also stores the
identity of one training. No other training writes or removes anything in it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import CheckpointError, PeftcoreError, TrainingError
from peftcore.files.formats.native import TENSORS
from peftcore.files.safe_io import TensorFile, discard, make_folder, read_json, sync_folder, write_tensors, write_text
from peftcore.injection.applied import fill
from peftcore.injection.injection import Injection
from peftcore.layers.fsdp import gathered, in_group, is_sharded

STATE, STATE_TENSORS = "training.json", "training.safetensors"
_TENSOR, _TUPLE, _PAIRS, _FLOAT = "tensor", "tuple", "pairs", "float"
STEP = "step-"
PARTIAL, BEFORE = ".partial", ".before"
"""Suffixes of a checkpoint's folder name: while the checkpoint is being written, and while a newer checkpoint of the
same step replaces it."""
OWNER = "owner.json"
"""The file with the identity of the training to which a folder belongs."""


def newest(folder: Path) -> Path | None:
    """Returns the checkpoint with the highest step in a folder; None if the folder does not contain checkpoints."""
    found: dict[tuple[int, bool], Path] = {}
    for each in folder.glob(f"{STEP}*"):
        number = each.name.removeprefix(STEP).removesuffix(BEFORE)
        if number.isdecimal():
            found[int(number), each.suffix != BEFORE] = each
    return found[max(found)] if found else None


def claim(folder: Path, training: str, takes_over: bool = False) -> None:
    """Mark a folder as belonging to a training. If several processes train together, all of them call this, and the
    first one writes.

    Args:
        folder: the folder for its checkpoints.
        training: the training's identity.
        takes_over: whether this training continues another one, whose checkpoints are in the folder. The folder then
            belongs to this training only.

    Raises:
        TrainingError: the folder belongs to another training. Nothing was written.
    """
    _first_does(lambda: _claim(folder, training, takes_over))


def _claim(folder: Path, training: str, takes_over: bool) -> None:
    held = read_json(folder / OWNER).get("training") if (folder / OWNER).exists() else None
    if held == training:
        return
    if not takes_over and (held is not None or newest(folder) is not None):
        what = "has checkpoints of" if newest(folder) is not None else "belongs to"
        raise TrainingError(
            f"{folder} {what} an earlier training, or one that still runs: pass another folder, one for each adapter, "
            "or continue that training with join(..., resume=True)"
        )
    make_folder(folder)
    write_text(folder / OWNER, json.dumps({"training": training}) + "\n")


def _first_does(act: Callable[[], None]) -> None:
    """Call a function in the first of the processes that train together. If it raises an error there, all processes
    raise that error."""
    if not in_group():
        act()
        return
    told: list[BaseException | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            act()
        except (PeftcoreError, OSError) as error:
            told = [error]
    torch.distributed.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise told[0]


def write(injection: Injection, state: Mapping[str, Any], folder: Path, step: int, training: str) -> Path:
    """Write a checkpoint, remove the earlier ones, and return its folder. If several processes train together, all of
    them call this, and the first one writes.

    Args:
        injection: the adapter.
        state: the training state to store next to it.
        folder: the folder of this training, or one that does not belong to a training yet.
        step: the step that was taken last. An existing checkpoint of this step is replaced.
        training: the training's identity.

    Raises:
        TrainingError: the state is not plain data, or the folder belongs to another training. Nothing was written.
    """
    tensors: dict[str, Tensor] = {}
    told = json.dumps(_split(state, "state", tensors))
    claim(folder, training)
    place = folder / f"{STEP}{step:08d}"
    partial = place.with_name(place.name + PARTIAL)
    first = not in_group() or torch.distributed.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)

    def finish() -> None:
        write_tensors(partial / STATE_TENSORS, tensors, {})
        write_text(partial / STATE, told)
        if place.exists():
            before = place.with_name(place.name + BEFORE)
            shutil.rmtree(before, ignore_errors=True)
            place.rename(before)
        partial.rename(place)
        sync_folder(folder)
        for each in folder.glob(f"{STEP}*"):
            if each != place:
                shutil.rmtree(each, ignore_errors=True)

    try:
        if first or is_sharded(injection.model):  # to gather it takes all of them
            injection.save(partial)
        _first_does(finish)
    except BaseException:
        if first:
            discard(partial)
        raise
    return place


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a value in a form that JSON can store. Its tensors are put into `tensors` by path. Tuples, mappings and
    infinite numbers are marked, since JSON has no such types.

    Raises:
        TrainingError: the value is not plain data.
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
        f"the state of the optimizer or the schedule holds a {type(value).__name__}, which cannot be saved as plain "
        "data: use an optimizer and a schedule of torch"
    )


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the value from which `_split` made `value`."""
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
    """Returns the training state that is stored next to an adapter.

    Raises:
        CheckpointError: the state is missing or damaged.
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
        CheckpointError: the checkpoint holds another adapter, or is damaged.
    """
    file = TensorFile(place / TENSORS)
    wanted = {key: each.shape for key, each in injection.state_dict().items()}
    wrong = sorted(key for key, shape in wanted.items() if file.shapes.get(key) != shape)
    if wrong:
        raise CheckpointError(
            f"{place} is a checkpoint of another adapter: {len(wrong)} tensors of {injection.name!r} are missing in it "
            f"or have another shape, such as {wrong[0]}; apply the adapter with the options it was trained with"
        )
    return file.read(wanted)


def put(injection: Injection, values: Mapping[str, Tensor]) -> None:
    """Copy values into an adapter's tensors. If the adapter is sharded, all processes call this."""
    with gathered(injection.model, injection.parameters):
        fill(injection, values)
