"""The description of an adapter from its file alone, without a host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Size

from peftcore.errors import PeftcoreError
from peftcore.files.safe_io import TensorFile


@dataclass(frozen=True)
class Description:
    """The description of one adapter, made without reading the values of its tensors."""

    format: str
    """The name of the format."""
    files: tuple[TensorFile, ...]
    """The files of its tensors."""
    methods: tuple[str, ...] = ()
    """Names of peftcore's methods that compute the adapter; empty if there is no such method, or if it depends on the
    host."""
    kind: str = ""
    """The other library's name for the method."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the method, as the file has them."""
    base: str = ""
    """The name of the base in the file; empty if the file does not name it."""
    base_revision: str = ""
    """The commit or branch of the base's repository; empty if the file does not name it."""
    tokens: int = 0
    """The number of rows of the token tables if rows were added to them; otherwise, or if the file does not contain the
    number, 0."""
    host: str = ""
    """The class of the model that the adapter was made on; empty if the file does not name it."""
    classes: tuple[str, ...] = ()
    """Class names of the classification head that the adapter was trained with, in the order of their ids; empty if the
    file has none."""
    task: str = ""
    """Peft's task type of the model that the adapter was made on, such as "CAUSAL_LM"."""
    parts: tuple[str, ...] = ()
    """The models of a pipeline that the file is for; empty if it is not for a pipeline."""
    sites: tuple[str, ...] = ()
    """The paths of the adapter's operators, as the file spells them; empty if the method chooses its sites itself."""
    trained: Mapping[str, Size] = field(default_factory=dict)
    """The shapes of the host's parameters that the adapter replaces, keyed by path."""
    words: Mapping[str, int] = field(default_factory=dict)
    """The number of vectors of each new word in the file. The token ids of these words have to be passed to `load`."""
    problem: str = ""
    """The reason why the adapter cannot be loaded, if that is known without a host; otherwise empty."""

    @property
    def values(self) -> int:
        """The number of values in its tensors."""
        return sum(math.prod(shape) for file in self.files for shape in file.shapes.values())

    @property
    def bytes(self) -> int:
        """The size of its tensors, in bytes."""
        every = [(file.shapes[name], dtype) for file in self.files for name, dtype in file.dtypes.items()]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in every)


def tensor_files(path: Path) -> tuple[TensorFile, ...]:
    """Returns the safetensors files in a folder, or the one file."""
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return tuple(map(TensorFile, found))


def trouble(attempt: Callable[[], object]) -> str:
    """Returns the message of the error that `attempt` raises; empty if it raises none."""
    try:
        attempt()
    except PeftcoreError as error:
        return str(error)
    return ""


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Returns each name once, in order."""
    return tuple(dict.fromkeys(names))
