"""A cache of tensors that take seconds to train: trained once a machine, safetensors files in a folder of caches.

A file's name holds a hash of all that its tensors follow from: the text of the recipe, and the versions of Python and
of the libraries. So nothing is ever out of date, and the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from peftcore.errors import CheckpointError
from peftcore.files.safe_io import TensorFile, write_tensors

CACHE = "PEFTCORE_CACHE"
"""Environment variable: the folder, ``peftcore`` in XDG_CACHE_HOME or in ``~/.cache`` when it is not set."""
LIBRARIES = ("torch", "numpy", "transformers", "diffusers", "scikit-learn")
"""Libraries that provide the hosts and data of the tasks."""


def folder() -> Path:
    """Return the folder of the cache.

    Raises:
        RuntimeError: the variable is not set, and the user has no home.
    """
    told, caches = os.environ.get(CACHE), os.environ.get("XDG_CACHE_HOME")
    return Path(told) if told else (Path(caches) if caches else Path.home() / ".cache") / "peftcore"


def trained_once(
    name: str, recipe: str, train: Callable[[], Mapping[str, Tensor]], like: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return the tensors that `train` makes, or made in an earlier process. A file that is damaged, or holds something
    else than tensors `like` these, is made anew; where no file can be written, nothing is cached.

    Args:
        name: begins the name of the file.
        recipe: the source text that `train` follows.
        train: makes the tensors.
        like: tensors with the names, shapes and dtypes of those that `train` makes.
    """
    try:
        file = folder() / f"{name}-{_key(recipe)}.safetensors"
    except RuntimeError:
        return train()
    with contextlib.suppress(CheckpointError):
        found = TensorFile(file).read()
        if _forms(found) == _forms(like):
            return found
    made = train()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, made, {})
    return made


def _key(recipe: str) -> str:
    versions = [f"{library} {_version(library)}" for library in LIBRARIES]
    return hashlib.sha256("\n".join([platform.python_version(), *versions, recipe]).encode()).hexdigest()[:16]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
