"""The description in an adapter file, for people who have the file and no host."""

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
    """The description of one adapter. Values of tensors were not read."""

    format: str
    """The name of the format."""
    files: tuple[TensorFile, ...]
    """The files of its tensors."""
    methods: tuple[str, ...] = ()
    """Our methods that compute the adapter; empty if no method does, or if that depends on the host."""
    kind: str = ""
    """The other library's name for the method."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the method, as the file has them."""
    base: str = ""
    """The file's name for the weights that it belongs to; empty if the file does not name them."""
    base_revision: str = ""
    """The commit, or branch, of the repository with these weights; empty if the file does not name it."""
    tokens: int = 0
    """The number of rows that token tables had to which rows were added; 0 if the file does not contain it."""
    host: str = ""
    """The class of the model that it was made on; empty where the file does not name it."""
    classes: tuple[str, ...] = ()
    """Names of the classes of the head that it was trained with, in the order of their numbers; empty where the file
    names none."""
    task: str = ""
    """Peft's name for the kind of model that it was made on."""
    parts: tuple[str, ...] = ()
    """The models of a pipeline that the file is for; empty where it is for no pipeline."""
    sites: tuple[str, ...] = ()
    """The places of its operators, as the file spells them; empty where the method finds its place itself."""
    trained: Mapping[str, Size] = field(default_factory=dict)
    """Parameters of the host that it replaces, with their shapes."""
    words: Mapping[str, int] = field(default_factory=dict)
    """New words next to the adapter, whose ids have to be passed to `load`, and the number of vectors of each."""
    problem: str = ""
    """Why it cannot be loaded here, where that shows without a host."""

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
    """Returns the message of the error with which `attempt` is refused; empty where it is not."""
    try:
        attempt()
    except PeftcoreError as error:
        return str(error)
    return ""


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Returns each name once, in order."""
    return tuple(dict.fromkeys(names))
