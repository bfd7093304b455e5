"""Finds the part of a file that is for a host, if the file has adapters for several models of a pipeline. The models
are distinguished by prefixes of tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from peftcore.errors import CheckpointError, HostMismatch
from peftcore.files.formats.rebasing import Move, find_move
from peftcore.files.safe_io import TensorFile
from peftcore.registry.plugins import layer_of, registry


@dataclass(frozen=True)
class PipelinePart:
    """The tensors of one model in a file, for one possible reading of their names."""

    name: str
    """The model's name in the pipeline; empty if names have no prefix."""
    names: Mapping[str, str]
    """Maps the parsed names of tensors to their names in the file."""
    outputs: Mapping[str, int]
    """The number of outputs of each module, keyed by path; -1 if the tensors do not determine it."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Maps the spelling of a module's path in the file to the path on the host; empty if the file uses the host's
    spelling."""


def fitting(parts: Sequence[PipelinePart], model: nn.Module, file: Path) -> tuple[PipelinePart, Move]:
    """Returns the part of a file that is for `model`, and the function (`Move`) that translates paths in the file into
    paths of the host. Parts are compared with the host by the names of modules, and if several fit, as for two text
    encoders, by the modules' sizes.

    Raises:
        HostMismatch: no part fits, or several do.
    """
    modules = dict(model.named_modules())
    found, reasons = [], []
    for part in parts:
        here = part.places or {path: path for path in modules}
        title = f"the part {part.name!r} of {file}" if part.name else f"the adapter in {file}"
        title += " (with dots for underscores)" if part.places else ""
        try:
            found.append((part, find_move(part.outputs, here, title)))
        except HostMismatch as error:
            reasons.append(str(error))
    if not found:
        raise HostMismatch("; ".join(dict.fromkeys(reasons)))
    if len(found) > 1:
        found = [(part, move) for part, move in found if _sized(part, move, modules)] or found
    names = list(dict.fromkeys(repr(part.name) for part, _ in found))
    if len(names) > 1:
        raise HostMismatch(f"{' and '.join(names)} of {file} all fit this host; put each in a separate file")
    return found[0]


def _sized(part: PipelinePart, move: Move, modules: Mapping[str, nn.Module]) -> bool:
    for path, outputs in part.outputs.items():
        place = move(path)
        module = modules[part.places.get(place, place)]
        layer = layer_of(module, "weight")
        if outputs != -1 and (not layer.has(module, "weight") or layer.shape(module, "weight")[0] != outputs):
            return False
    return True


def split(names: Sequence[str], known: Callable[[str], str | None]) -> dict[str, list[str]]:
    """Returns names grouped by the part that they belong to; ``""`` for names without a known prefix."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(known(name) or "", []).append(name)
    return found


def is_unet(model: nn.Module) -> bool:
    """True if a host has down and up blocks, as a UNet has."""
    return {"down_blocks", "up_blocks"} <= {name for name, _ in model.named_children()}


def is_text_encoder(model: nn.Module) -> bool:
    """True if a host contains a stack of blocks that reads token ids, as text encoders do."""
    return "stack" in registry().hook.peftcore_map(model=model).roles()


def clip_prefix(model: nn.Module) -> str:
    """Returns the prefix of a CLIP text encoder's modules in files, if the host's modules do not have it, as in newer
    versions of transformers; otherwise empty."""
    modules = dict(model.named_modules())
    return "text_model." if {"encoder.layers.0.self_attn.q_proj", "final_layer_norm"} <= modules.keys() else ""


def only_file(path: Path, preferred: str) -> Path | None:
    """Returns the file to read: `path` itself, or the file in the folder with the preferred name, or the only file
    there; None if there is no such file."""
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    held = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    named = [each for each in held if each.name == preferred]
    return next(iter(named or held), None) if named or len(held) == 1 else None


def names_in(path: Path | None) -> list[str]:
    """Returns the names of a file's tensors; empty if the file cannot be read."""
    try:
        return [] if path is None else list(TensorFile(path).shapes)
    except CheckpointError:
        return []
