"""Files with adapters of several models of one pipeline, distinguished by the prefixes of names: finding the part for a
host, and the prefix when an adapter is saved."""

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
    """The tensors of one model in a file, in one way of reading their names."""

    name: str
    """The model's name in the pipeline; empty where names have no prefix."""
    names: Mapping[str, str]
    """Names in the file, by the names that they mean."""
    outputs: Mapping[str, int]
    """The number of outputs of the module at a path; -1 where the tensors do not determine it."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Paths on the host, by the way in which the file spells them, where it is not the host's own."""


def fitting(parts: Sequence[PipelinePart], model: nn.Module, file: Path) -> tuple[PipelinePart, Move]:
    """Returns the part of a file that is for `model`, and the move of its paths to the host's.

    By the names of the modules; where these fit several parts, as those of two text encoders do, by their sizes.

    Raises:
        HostMismatch: none fits, or several do.
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
    """Returns names by the part that they belong to; ``""`` for names without the prefix of a known part."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(known(name) or "", []).append(name)
    return found


def is_unet(model: nn.Module) -> bool:
    """Whether a host is a UNet, by its blocks down and up."""
    return {"down_blocks", "up_blocks"} <= {name for name, _ in model.named_children()}


def is_text_encoder(model: nn.Module) -> bool:
    """Whether a host is a text encoder, that is takes token ids."""
    return "stack" in registry().hook.peftcore_map(model=model).roles()


def clip_prefix(model: nn.Module) -> str:
    """Returns the prefix of a CLIP text encoder's modules in files, which newer versions of transformers leave out."""
    modules = dict(model.named_modules())
    return "text_model." if {"encoder.layers.0.self_attn.q_proj", "final_layer_norm"} <= modules.keys() else ""


def only_file(path: Path, preferred: str) -> Path | None:
    """Returns the file to read: `path` itself, or in a folder the one of that name, or the only one."""
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    held = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    named = [each for each in held if each.name == preferred]
    return next(iter(named or held), None) if named or len(held) == 1 else None


def names_in(path: Path | None) -> list[str]:
    """Returns the names of a file's tensors; nothing where it cannot be read."""
    try:
        return [] if path is None else list(TensorFile(path).shapes)
    except CheckpointError:
        return []
