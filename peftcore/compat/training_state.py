"""Saves the training state of an adapter in an extra file in the adapter's folder, so that transformers' Trainer can
resume the training of a `PeftModel`. Adapter files do not contain the statistics of schedules, and do not contain all
tensors exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from peftcore.compat.schedules import has_schedule
from peftcore.errors import SwapError
from peftcore.files.safe_io import TensorFile, write_tensors
from peftcore.injection.injection import Injection
from peftcore.trainers.trainer_checkpoints import digest
from peftcore.training.optimizer import transient

FILE = "peftcore_training.safetensors"
VALUES, BETWEEN = "values.", "between."
"""Two prefixes of names in the file: for the adapter's own tensors, and for state between steps (non-persistent
buffers)."""
OPTIONS = "options"
"""The key of the file's metadata under which the method and its options are stored, to check that the file belongs to
an adapter."""


def digests(injection: Injection) -> dict[str, bytes]:
    """Returns digests of an adapter's state between steps (non-persistent buffers), to detect later whether it
    changed."""
    return {name: digest(buffer) for name, buffer in transient(injection) if not buffer.is_meta}


def save_training_state(injection: Injection, folder: Path, before: Mapping[str, bytes]) -> None:
    """Write the state that is needed to continue a training exactly. It is written if the adapter is trainable, and has
    a schedule or state between steps (non-persistent buffers) that changed. Otherwise an older file is removed.

    Args:
        injection: the adapter.
        folder: the adapter's folder.
        before: digests of the state between steps when the adapter was created.
    """
    trains = any(parameter.requires_grad for parameter in injection.parameters())
    if not trains or not (has_schedule(injection) or digests(injection) != before):
        (folder / FILE).unlink(missing_ok=True)  # of an adapter that was there before
        return
    tensors = {f"{VALUES}{name}": value for name, value in injection.state_dict().items()}
    tensors |= {f"{BETWEEN}{name}": value for name, value in transient(injection)}
    write_tensors(folder / FILE, tensors, {OPTIONS: _options(injection)})


def load_training_state(injection: Injection, folder: Path) -> bool:
    """Restore the training state of an adapter that `save_training_state` wrote into a folder.

    Returns:
        True if the folder has a training state. If not, nothing is changed.

    Raises:
        CheckpointError: the file is damaged.
        SwapError: the state belongs to another adapter. Nothing was changed.
    """
    if not (folder / FILE).is_file():
        return False
    file = TensorFile(folder / FILE)
    buffers = dict(transient(injection))
    shapes = {name.removeprefix(BETWEEN): shape for name, shape in file.shapes.items() if name.startswith(BETWEEN)}
    if file.metadata.get(OPTIONS) != _options(injection) or shapes != {name: b.shape for name, b in buffers.items()}:
        raise SwapError(
            f"the training in {folder} is of another adapter than {injection.name!r}, or has other options: apply the "
            "same adapter; or start a new training with PeftModel.from_pretrained(model, folder, is_trainable=True)"
        )
    tensors = file.read()
    injection.swap({name.removeprefix(VALUES): each for name, each in tensors.items() if name.startswith(VALUES)})
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(tensors[f"{BETWEEN}{name}"])
    return True


def _options(injection: Injection) -> str:
    return "\n".join(f"{each.method.name} {each.config.model_dump_json()}" for each in injection.family())
