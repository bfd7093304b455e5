"""The kinds of names that a MODEL argument may have in commands, files and Python. There is one class for each kind; it
finds the model's files, and returns the arguments for loading them.

No weights are loaded here. `Named.check` raises an error for uses that a kind of name does not support.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from peftcore.errors import BadInput
from peftcore.models.configurations import CONFIG, PIPELINE, read_config
from peftcore.utils.packages import PACKAGE, package_folder, require

MODEL = (
    "A folder of a model, a GGUF file, package:NAME or package:NAME/FOLDER for what an installed Python package holds, "
    "timm:NAME, or a name on the Hub."
)
"""The help text of MODEL in all commands and in the schemas of their files. It lists the names that are accepted."""
GGUF, TIMM = ".gguf", "timm:"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
DENOISERS = ("unet", "transformer")
"""Names of the folders in a pipeline of diffusers that may contain the model to train."""
SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of the files in a repository that are not weights: configurations and tokenizers."""
WEIGHTS = ".safetensors"


class Use(Enum):
    """The purposes for which commands need a model."""

    TEXT = "text"
    """A model that reads tokens, so it has a tokenizer."""
    PICTURES = "pictures"
    PIPELINE = "pipeline"
    """A pipeline of diffusers."""
    MERGE = "merge"
    """A model whose weights are written to a new folder, in the model's own format."""


@dataclass(frozen=True)
class ModelConfiguration:
    """A model's configuration and its source."""

    config: Mapping[str, Any]
    source: str
    """The name that is shown to the user: the name that the user passed, or a folder inside a pipeline."""
    name: str
    """The name that the library's loaders accept; files of adapters store it."""
    folder: Path | None = None
    """The folder with the model's files; None if there is no such folder."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Additional arguments for transformers' loaders."""


@dataclass(frozen=True)
class Named(ABC):
    """Base class of models given by name. Each kind of name has one subclass."""

    said: str
    refusals: ClassVar[Mapping[Use, str]] = {}
    """Error messages for the uses that this kind of name does not support, with the names to use instead."""

    def check(self, use: Use) -> None:
        """Verify that this kind of name supports a use.

        Raises:
            BadInput: the use is not supported.
        """
        if use in self.refusals:
            raise BadInput(f"{self.said} {self.refusals[use]}")

    @abstractmethod
    def origin(self) -> tuple[str, dict[str, Any]]:
        """Return the name and the keyword arguments to pass to transformers' `from_pretrained`.

        Raises:
            BadInput: transformers cannot load it.
        """

    @abstractmethod
    def place(self) -> Path:
        """Return the folder with the model's files, or the GGUF file. Weights are downloaded from the Hub if necessary.

        Raises:
            BadInput: the files cannot be found or downloaded.
        """

    @abstractmethod
    def configured(self) -> ModelConfiguration:
        """Return the model's configuration; weights are not downloaded.

        Raises:
            BadInput: the configuration cannot be found or downloaded.
        """

    def local(self) -> tuple[Path, ...]:
        """Return the user's own files or folders that contain the model, so that a command does not overwrite them."""
        return ()


@dataclass(frozen=True)
class InFolder(Named):
    """A folder that contains a model of transformers, timm or diffusers, or a whole pipeline of diffusers."""

    path: Path

    def origin(self) -> tuple[str, dict[str, Any]]:
        return str(self.path), {"local_files_only": True}

    def place(self) -> Path:
        return self.path

    def configured(self) -> ModelConfiguration:
        where, config = _denoiser_or_model(self.path)
        return ModelConfiguration(config, str(where), str(where), where, {"local_files_only": True})

    def local(self) -> tuple[Path, ...]:
        return (self.path,)


@dataclass(frozen=True)
class InGguf(Named):
    """A GGUF file, which transformers dequantizes and loads as a language model."""

    path: Path
    refusals: ClassVar[Mapping[Use, str]] = {
        Use.PICTURES: "is a GGUF file, which contains a language model: pass a folder, timm:NAME, or a name on the "
        "Hub, of a model of pictures",
        Use.PIPELINE: "is a GGUF file, which contains a language model: pass the folder or the name on the Hub of a "
        "pipeline of diffusers",
        Use.MERGE: "is a GGUF file, which peftcore reads but does not write: merge into the folder or the name on the "
        "Hub of the model that it was made from",
    }

    def origin(self) -> tuple[str, dict[str, Any]]:
        return str(self.path.parent), {"gguf_file": self.path.name, "local_files_only": True}

    def place(self) -> Path:
        return self.path

    def configured(self) -> ModelConfiguration:
        name, options = self.origin()
        return ModelConfiguration({"model_type": GGUF}, self.said, name, None, options)  # transformers reads the rest

    def local(self) -> tuple[Path, ...]:
        return (self.path,)


@dataclass(frozen=True)
class OnHub(Named):
    """A repository on the Hub. Its files are downloaded into the local cache; offline, only the cache is used."""

    name: str

    def origin(self) -> tuple[str, dict[str, Any]]:
        return self.name, {}

    def place(self) -> Path:
        settings = self._fetched(SETTINGS)
        parts = (settings / PIPELINE).is_file()  # then what lies beside the parts is the same once more
        return self._fetched((*SETTINGS, f"*/*{WEIGHTS}") if parts else (*SETTINGS, f"*{WEIGHTS}"), not parts)

    def configured(self) -> ModelConfiguration:
        folder = self._fetched(SETTINGS)
        where, config = _denoiser_or_model(folder)
        name = self.name if where == folder else str(where)
        return ModelConfiguration(config, self.said, name, where)

    def _fetched(self, files: tuple[str, ...], top: bool = False) -> Path:
        """Download the files that match the patterns, and return the repository's folder in the cache. With `top`,
        weights in subfolders are skipped."""
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError

        beside = [f"*/*{WEIGHTS}"] if top else None
        try:
            return Path(
                huggingface_hub.snapshot_download(self.name, allow_patterns=list(files), ignore_patterns=beside)
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BadInput(
                f"{self.said}: no such folder, and no model that could be fetched from the Hub ({reason})"
            ) from None


@dataclass(frozen=True)
class OfTimm(Named):
    """An architecture of timm, with the weights that timm provides for it on the Hub."""

    refusals: ClassVar[Mapping[Use, str]] = {
        Use.TEXT: "is a model of pictures: pass a folder, a GGUF file or a name on the Hub, of a model that reads text",
        Use.PIPELINE: "is a model of pictures: pass the folder or the name on the Hub of a pipeline of diffusers",
    }

    @property
    def architecture(self) -> str:
        return self.said.removeprefix(TIMM)

    def origin(self) -> tuple[str, dict[str, Any]]:
        return self._weights().origin()

    def place(self) -> Path:
        return self._weights().place()

    def configured(self) -> ModelConfiguration:
        return ModelConfiguration({"architecture": self.architecture}, self.said, self.architecture)

    def _weights(self) -> OnHub:
        require({"timm": "timm"})
        import timm

        check_architecture(self.said, self.architecture)
        try:
            found = timm.get_pretrained_cfg(self.architecture)
        except RuntimeError as error:  # no such tag
            raise BadInput(f"{self.said}: {error}") from None
        name = found and found.hf_hub_id
        if not name:
            raise BadInput(f"{self.said}: timm has no weights for it on the Hub; save a model, and pass its folder")
        return OnHub(self.said, name)


def find(model: Path | str) -> Named:
    """Return the object for the name of a model, whatever kind of name it is.

    Raises:
        BadInput: the name looks like a path that does not exist, or like a package that is not installed.
    """
    said = str(model)
    if isinstance(model, str) and said.startswith(TIMM):
        return OfTimm(said)
    path = _in_package(said) if said.startswith(PACKAGE) else Path(model)
    if path.suffix == GGUF and path.is_file():
        return InGguf(said, path)
    if path.is_dir():
        files = _models(path)
        if len(files) > 1:
            raise BadInput(
                f"{path}: has several models; pass one of these files: {', '.join(each.name for each in files)}"
            )
        if not files:
            reason = f"contains no model{_inside(said, path)}"
            raise BadInput(f"{said}: {reason}; a model is a folder with {CONFIG} or a GGUF file")
        return InFolder(said, path) if files == [path] else InGguf(said, files[0])
    if not isinstance(model, str) or path.suffix == GGUF or not HUB_NAME.fullmatch(said):
        raise BadInput(f"{said}: no such folder; a model is a folder with config.json, weights and tokenizer")
    return OnHub(said, said)


def check_architecture(source: str, name: str) -> None:
    """Verify that timm has an architecture of that name.

    Raises:
        BadInput: timm does not have it.
    """
    import timm

    if not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise BadInput(f"{source}: timm has no model {name!r}{hint}")


def _models(folder: Path) -> list[Path]:
    """Return the paths of the models in a folder: the folder itself if it has a configuration, otherwise its GGUF
    files."""
    described = any((folder / name).exists() for name in (CONFIG, PIPELINE))
    return [folder] if described else sorted(folder.glob(f"*{GGUF}"))


def _inside(said: str, folder: Path) -> str:
    """Return the end of an error message, which names subfolders that contain models; empty if there are none."""
    found = [f"{said}/{each.name}" for each in sorted(folder.iterdir()) if each.is_dir() and _models(each)][:5]
    return f", but {' and '.join(found)} {'does' if len(found) == 1 else 'do'}" if found else ""


def _in_package(model: str) -> Path:
    """Return a folder inside a Python package. The package is not imported."""
    name, _, inside = model.removeprefix(PACKAGE).partition("/")
    if (folder := package_folder(name)) is None:
        raise BadInput(f"{model}: the package {name!r} is not installed")
    return folder / inside


def _denoiser_or_model(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a model, or of the denoiser of a pipeline, and its configuration."""
    if (folder / CONFIG).is_file():
        return folder, read_config(folder / CONFIG)
    inside = [folder / name for name in DENOISERS if (folder / name / CONFIG).is_file()]
    if (folder / PIPELINE).is_file() and inside:
        return inside[0], read_config(inside[0] / CONFIG)
    raise BadInput(f"{folder}: contains neither {CONFIG} nor a pipeline with a {' or a '.join(DENOISERS)}")
