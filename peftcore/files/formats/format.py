"""`Format`, the base class of file formats: it recognizes its files, reads an adapter from them, and writes one.

A plugin registers more by the hook `peftcore_formats`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.envelope import Envelope
from peftcore.files.formats.description import Description, tensor_files
from peftcore.injection.injection import Injection
from peftcore.registry.plugins import imported, named_places

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of pickles that hold tensors."""
TRAINER = "trainer_state.json"
"""The file by which a checkpoint of transformers' Trainer is known."""
STATE = re.compile(r"(optimizer|scheduler|scaler|sampler|training_args|rng_state|random_states)[\w-]*\.\w+")
"""Files with the state of a training, next to the tensors: they contain no adapter."""


@dataclass(frozen=True)
class Tensors:
    """The content of a safetensors file."""

    values: Mapping[str, Tensor]
    """The tensors by name."""
    metadata: Mapping[str, str]
    """The texts of the file's header."""


@dataclass(frozen=True)
class Placed:
    """The content of a text file that contains its own path, for readers that look up its names elsewhere."""

    text: Callable[[Path], str]
    """The text, from the folder in which the adapter will be."""


@dataclass(frozen=True)
class Made:
    """The content of a file that another library writes."""

    write: Callable[[Path], None]
    """Write the file to a path that does not exist yet."""


Files = Mapping[str, str | Tensors | Placed | Made]


class Content(ABC):
    """The content of an adapter file in our terms: the envelope, and the tensors once the operators are known."""

    def __init__(self, envelope: Envelope, where: Path) -> None:
        self.envelope = envelope
        self.where = where
        """The file, for messages."""

    @abstractmethod
    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        """Returns the adapter's tensors by our own names.

        Args:
            surgeon: the recorded operators for the host, on the meta device.
            strict: False accepts missing and unknown tensors.

        Raises:
            CheckpointError: naming every tensor that is missing, unknown, misshaped or not finite.
        """


class Format(ABC):
    """Base class of file formats."""

    name: ClassVar[str]
    """The name of the format, by which `save` takes it."""
    file: ClassVar[str] = ""
    """The name of the file that holds an adapter by itself; empty where that takes several files."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Models of a pipeline that a file of this format can hold adapters of, by the names that it has for them."""

    def __init__(self, part: str = "") -> None:
        self.part = part
        """The one of `parts` that a saved adapter is for; empty: guessed from the host."""

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """Whether a folder or file is of this format. Reads names and headers, and raises nothing for files of other
        formats."""

    @abstractmethod
    def open(self, path: Path, model: nn.Module) -> Content:
        """Read the content of a folder or file for `model`, and no values yet.

        Raises:
            CheckpointError: it is damaged, or has options that are not known.
            HostMismatch: it belongs to another base.
            NewerFormat: it was written by a newer version.
            UnknownMethod: no installed plugin has its method.
        """

    def open_with_words(self, path: Path, model: nn.Module, words: Mapping[str, Sequence[int]]) -> Content:
        """Read the content with the new words that it has next to the adapter, given the ids of each in the tokenizer.

        Raises:
            CheckpointError: as `open`; or it has no such words.
            HostMismatch, NewerFormat, UnknownMethod: as `open`.
        """
        raise CheckpointError(f"{path}: files of {self.name} contain no words; remove words=")

    def describe(self, path: Path) -> Description:
        """Returns the description in a folder or file without a host. Formats that know more than the tensors override
        it.

        Raises:
            CheckpointError: it is damaged.
            NewerFormat: it was written by a newer version.
        """
        return Description(self.name, tensor_files(path))

    def options(self, path: Path) -> Mapping[str, Any]:
        """Returns the options in a folder or file by which other programs read its tensors; none where these tell all.

        Raises:
            CheckpointError: it is damaged.
        """
        return {}

    def files(self, injection: Injection, weights: bool = False) -> Files:
        """Returns the contents of the files to write for an injection, by name, in the order in which they are written;
        a name may have folders, ``"0/adapter.json"``.

        Args:
            weights: record a digest of the base's values at the sites, where the format has a place for it.

        Raises:
            ExportError: the format cannot hold it.
            PluginError: the adapter's tensors cannot be saved by name, since one has two.
        """
        raise ExportError(f"peftcore reads files of {self.name}, but does not write them; choose another format")


def formats() -> dict[str, type[Format]]:
    """Returns the formats of the core and of all plugins, by name, in the order in which they are asked."""
    return {name: imported(place) for name, place in named_places("peftcore_formats", "format").items()}


def format_named(name: str) -> Format:
    """Returns the format of that name; after a slash, the model of the pipeline: ``"diffusers/text_encoder_2"``.

    Raises:
        ExportError: the format does not exist, or it has no name for such a model.
    """
    known = formats()
    name, slash, part = name.partition("/")
    if name not in known:
        raise ExportError(f"there is no format {name!r}; there are: {', '.join(known)}")
    if slash and part not in known[name].parts:
        names = ", ".join(known[name].parts) or "none"
        raise ExportError(f"files of {name} have no part {part!r}; the parts that they can have: {names}")
    return known[name](part)


def recognize(path: Path) -> Format:
    """Returns the format of a folder or file.

    Raises:
        CheckpointError: it is of none, or there is nothing.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    for kind in formats().values():
        if kind.recognizes(path):
            return kind()
    raise CheckpointError(f"{path} is not an adapter in a known format ({', '.join(formats())}); {held_by(path)}")


def held_by(path: Path) -> str:
    """Returns what a folder holds in place of an adapter's file, for a message: adapters further down, a checkpoint of
    a training, or other files.

    Raises:
        CheckpointError: tensors in a pickle, saying how to convert it.
    """
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    if below := [each.name for each in inside if each.is_dir() and any(map(_of(each), formats().values()))]:
        return f"it contains adapters: {', '.join(below[:8])}"
    held = [each.name for each in inside]
    if TRAINER in held:
        return (
            "it is a checkpoint of transformers' Trainer without a file of an adapter: pass it to "
            "train(resume_from_checkpoint=...), or write an adapter with injection.save(folder)"
        )
    pickled = [name for name in held if name.endswith(PICKLES) and not STATE.fullmatch(name)]
    if pickled:
        raise CheckpointError(
            f"{path} keeps its tensors in {pickled[0]}, a pickle, which can run any code when it is read: if you trust "
            "it, convert it once with safetensors.torch.save_file(torch.load(file, weights_only=True), "
            f'"{pickled[0].rpartition(".")[0]}.safetensors")'
        )
    return f"it holds {', '.join(held[:8]) or 'nothing'}"


def _of(path: Path) -> Callable[[type[Format]], bool]:
    return lambda kind: kind.recognizes(path)
