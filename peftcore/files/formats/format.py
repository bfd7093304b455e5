"""`Format`, the base class of file formats: it recognizes its files, reads an adapter from them, and writes one.

A plugin registers further formats by the hook `peftcore_formats`.
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
"""Suffixes of pickled files that contain tensors."""
TRAINER = "trainer_state.json"
"""The file that identifies a checkpoint of transformers' Trainer."""
STATE = re.compile(r"(optimizer|scheduler|scaler|sampler|training_args|rng_state|random_states)[\w-]*\.\w+")
"""Names of files with the state of a training, such as that of the optimizer; they contain no adapter."""


@dataclass(frozen=True)
class Tensors:
    """The content of a safetensors file."""

    values: Mapping[str, Tensor]
    """The tensors by name."""
    metadata: Mapping[str, str]
    """The texts of the file's header."""


@dataclass(frozen=True)
class Placed:
    """The content of a text file that has to contain the path of its own folder, since programs do not look up the
    paths in it relative to the file."""

    text: Callable[[Path], str]
    """Returns the text, given the final folder of the adapter."""


@dataclass(frozen=True)
class Made:
    """A file that another library writes."""

    write: Callable[[Path], None]
    """Writes the file to a path that does not exist yet."""


Files = Mapping[str, str | Tensors | Placed | Made]


class Content(ABC):
    """The content of an adapter file, translated for peftcore: the envelope (method, options and sites), and the
    tensors, which are read after the operators were built."""

    def __init__(self, envelope: Envelope, where: Path) -> None:
        self.envelope = envelope
        self.where = where
        """The file, for messages."""

    @abstractmethod
    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        """Returns the adapter's tensors, keyed by their names in peftcore.

        Args:
            surgeon: the record of a dry run, with the operators for the host on the meta device.
            strict: False accepts missing and unknown tensors.

        Raises:
            CheckpointError: tensors are missing, unknown, misshaped or not finite; the message names all of them.
        """


class Format(ABC):
    """Base class of file formats."""

    name: ClassVar[str]
    """The name of the format, as passed to `save`."""
    file: ClassVar[str] = ""
    """The name of the file if one file holds a whole adapter; empty if an adapter needs several files."""
    parts: ClassVar[tuple[str, ...]] = ()
    """The models of a pipeline whose adapters a file of this format can hold, by the format's names for them."""

    def __init__(self, part: str = "") -> None:
        self.part = part
        """The one of `parts` for which an adapter is saved; if it is empty, the host determines it."""

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """True if a folder or file is of this format. Reads only names and headers, and raises no error for files of
        other formats."""

    @abstractmethod
    def open(self, path: Path, model: nn.Module) -> Content:
        """Open a folder or file as an adapter for `model`, without reading values yet.

        Raises:
            CheckpointError: it is damaged, or has unknown options.
            HostMismatch: it belongs to another base.
            NewerFormat: it was written by a newer version of peftcore or of the method's plugin.
            UnknownMethod: no installed plugin has its method.
        """

    def open_with_words(self, path: Path, model: nn.Module, words: Mapping[str, Sequence[int]]) -> Content:
        """Open a folder or file as `open` does, with the new words in it. `words` has the token ids of each word in the
        tokenizer.

        Raises:
            CheckpointError: as `open`; or it has no such words.
            HostMismatch, NewerFormat, UnknownMethod: as `open`.
        """
        raise CheckpointError(f"{path}: files of {self.name} contain no words; remove words=")

    def describe(self, path: Path) -> Description:
        """Returns the description of the adapter in a folder or file, without a host. Formats whose files describe more
        than tensors override this method.

        Raises:
            CheckpointError: it is damaged.
            NewerFormat: it was written by a newer version of peftcore or of the method's plugin.
        """
        return Description(self.name, tensor_files(path))

    def options(self, path: Path) -> Mapping[str, Any]:
        """Returns the options in a folder or file that other programs need to read its tensors; empty if the tensors
        are enough.

        Raises:
            CheckpointError: it is damaged.
        """
        return {}

    def files(self, injection: Injection, weights: bool = False) -> Files:
        """Returns the contents of the files to write for an injection, keyed by file name, in the order of writing. A
        name may contain a folder, ``"0/adapter.json"``.

        Args:
            weights: record a digest of the base's values at the sites, if the format can hold it.

        Raises:
            ExportError: the format cannot store the adapter.
            PluginError: the adapter's tensors cannot be saved by name, since one of them has two names.
        """
        raise ExportError(f"peftcore reads files of {self.name}, but does not write them; choose another format")


def formats() -> dict[str, type[Format]]:
    """Returns the formats of the core and of all plugins, keyed by name, in the order in which `recognize` tries
    them."""
    return {name: imported(place) for name, place in named_places("peftcore_formats", "format").items()}


def format_named(name: str) -> Format:
    """Returns the format with this name, which may end with a model of a pipeline after a slash:
    ``"diffusers/text_encoder_2"``.

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
        CheckpointError: it has no known format, or does not exist.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    for kind in formats().values():
        if kind.recognizes(path):
            return kind()
    raise CheckpointError(f"{path} is not an adapter in a known format ({', '.join(formats())}); {held_by(path)}")


def held_by(path: Path) -> str:
    """Returns text for an error message about a folder without an adapter's file: that it contains adapters in
    subfolders, a checkpoint of a training, or other files.

    Raises:
        CheckpointError: it contains pickled tensors; the message says how to convert them.
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
