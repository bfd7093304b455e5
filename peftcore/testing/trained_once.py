"""A cache for tensors whose training takes seconds: each is trained once on a machine, and stored as a safetensors
file.

A file's name contains a hash of everything that determines its tensors: the source text of the training, and the
versions of Python and of the libraries. So files are never out of date, and the folder may be deleted at any time.
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
"""Environment variable with the folder of the cache; by default ``peftcore`` in XDG_CACHE_HOME or in ``~/.cache``."""
LIBRARIES = ("torch", "numpy", "transformers", "diffusers", "scikit-learn")
"""The libraries that provide the hosts and data of the tasks; their versions go into the hash."""


def folder() -> Path:
    """Return the folder of the cache.

    Raises:
        RuntimeError: the variable is not set, and the user has no home folder.
    """
    told, caches = os.environ.get(CACHE), os.environ.get("XDG_CACHE_HOME")
    return Path(told) if told else (Path(caches) if caches else Path.home() / ".cache") / "peftcore"


def trained_once(
    name: str, recipe: str, train: Callable[[], Mapping[str, Tensor]], like: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return the tensors that `train` returns, from the cache if it has them. A file that is damaged, or whose tensors
    are not `like` these, is replaced. If no file can be written, nothing is cached.

    Args:
        name: the first part of the file's name.
        recipe: the source text that determines what `train` computes.
        train: computes the tensors.
        like: tensors with the same names, shapes and dtypes as the results of `train`.
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
