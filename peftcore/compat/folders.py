"""Saves adapters in folders with ``adapter_model.safetensors``, the file that transformers' Trainer and peft expect.
The format is peft's if it can store the adapter, otherwise peftcore's."""

from __future__ import annotations

import os
from pathlib import Path

import peft

from peftcore.errors import ExportError
from peftcore.injection.injection import Injection
from peftcore.layers.fsdp import is_sharded
from peftcore.utils.notices import notice

WEIGHTS = "adapter_model.safetensors"
"""The file that transformers' Trainer looks for to recognize a folder with an adapter."""
CONFIG = "adapter_config.json"


def save_folder(injection: Injection, folder: Path) -> None:
    """Save an adapter in a folder, in peft's format if this can store the adapter. Otherwise peftcore's format is used,
    and a warning is logged.

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
    """Returns the configuration of peft in a folder; None if the folder has no ``adapter_config.json``."""
    return peft.PeftConfig.from_pretrained(str(path)) if Path(path, CONFIG).is_file() else None
