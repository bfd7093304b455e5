"""Folders with ``adapter_model.safetensors``, which the Trainer and peft expect. They are in peft's format if that can
hold the adapter, otherwise in peftcore's format."""

from __future__ import annotations

import os
from pathlib import Path

import peft

from peftcore.errors import ExportError
from peftcore.injection.injection import Injection
from peftcore.layers.fsdp import is_sharded
from peftcore.utils.notices import notice

WEIGHTS = "adapter_model.safetensors"
"""The file by which the Trainer recognizes a folder with an adapter."""
CONFIG = "adapter_config.json"


def save_folder(injection: Injection, folder: Path) -> None:
    """Write an adapter into a folder, in peft's format if that can hold it; otherwise in peftcore's format, and log a
    notice.

    Raises:
        ExportError: the model is sharded over processes.
    """
    if is_sharded(injection.model):
        raise ExportError(
            "the model is sharded, so all processes have to save it, but the trainer saves in one: call "
            f"peftcore.injections(model.get_base_model())[{injection.name!r}].save(folder) in all of them"
        )
    try:
        injection.save(folder, format="peft")
    except ExportError as error:
        notice([f"{injection.name!r} is saved in peftcore's format, which peft does not read: {error}"])
        injection.save(folder)
        injection.save(folder / WEIGHTS)
        (folder / CONFIG).unlink(missing_ok=True)  # of an adapter that was there before


def config_in(path: str | os.PathLike[str]) -> peft.PeftConfig | None:
    """Returns the configuration of peft in a folder; None if the folder lacks one."""
    return peft.PeftConfig.from_pretrained(str(path)) if Path(path, CONFIG).is_file() else None
