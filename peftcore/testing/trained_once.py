"""A cache on disk for tensors whose training takes seconds. They are trained once on a machine, and stored in a
safetensors file.

The name of a file contains a hash of the source text of the training, and of the versions of Python and of libraries.
So a file is not used if its tensors would be different now. The folder may be deleted at any time.
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
"""Environment variable: the folder of the cache. By default it is the folder ``peftcore`` in XDG_CACHE_HOME, or in
``~/.cache``."""
LIBRARIES = ("torch", "numpy", "transformers", "diffusers", "scikit-learn")
"""The libraries that the tensors depend on. Their versions are part of the hash."""


def folder() -> Path:
    """Return the folder of the cache.

    Raises:
        RuntimeError: the environment variables are not set, and the user has no home folder.
    """
    told, caches = os.environ.get(CACHE), os.environ.get("XDG_CACHE_HOME")
    return Path(told) if told else (Path(caches) if caches else Path.home() / ".cache") / "peftcore"


def trained_once(
    name: str, recipe: str, train: Callable[[], Mapping[str, Tensor]], like: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return the tensors that `train` computes, from the cache if they are there. A file that is damaged, or has
    tensors of other names, shapes or dtypes than `like`, is replaced. If the file cannot be written, the tensors are
    not cached.

    Args:
        name: the first part of the file's name.
        recipe: the source text of the training, for the hash.
        train: a function that computes the tensors.
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
