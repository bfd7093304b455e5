"""The file format of peftcore. ``adapter.safetensors`` has the tensors, and in its header the envelope (method, options
and sites). So this file is a complete adapter, even if a save is interrupted. ``adapter.json`` repeats the envelope for
people and tools to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import CheckpointError, PluginError
from peftcore.files.added_rows import AddedRows, added_rows, spans
from peftcore.files.envelope import Envelope, SavedSite, envelope_of, method_of, options_of, parse_envelope
from peftcore.files.formats.description import Description, trouble, unique
from peftcore.files.formats.format import Content, Files, Format, Tensors
from peftcore.files.formats.rebasing import Move, find_move
from peftcore.files.safe_io import TensorFile, parse_json
from peftcore.injection.injection import Injection
from peftcore.surgery.planning import Plan

ENVELOPE, TENSORS = "adapter.json", "adapter.safetensors"
METADATA = "peftcore"
"""The key of the envelope in the header of the safetensors file."""


class Native(Format):
    """The file format of peftcore."""

    name = "peftcore"
    file = TENSORS

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        if (path / ENVELOPE).exists():
            return True
        file = path / TENSORS if path.is_dir() else path
        try:
            return file.name.endswith(".safetensors") and file.exists() and METADATA in TensorFile(file).metadata
        except CheckpointError:
            return path.is_dir()  # damaged, and called as ours are

    def open(self, path: Path, model: nn.Module) -> Content:
        file, envelope = _read(path)
        paths = [site.module_path for sites in envelope.selections.values() for site in sites]
        modules = dict(model.named_modules())
        move = find_move(paths, modules, f"the adapter in {file.path} (made on {envelope.host})")
        here = {path for path in envelope.rows if move.covers(path) and move(path) in modules}
        left = envelope.rows.keys() - here  # of a head, where this host has another one or none
        envelope = envelope.model_copy(update={"rows": {path: envelope.rows[path] for path in sorted(here)}})
        return NativeContent(moved(envelope, move), file, move, tuple(f"{path}:rows." for path in left))

    def describe(self, path: Path) -> Description:
        file, envelope = _read(path)
        sites = [site for each in envelope.selections.values() for site in each]
        names = {each: f"{each.removesuffix('.weight')}.value" for each in envelope.train}
        return Description(
            self.name,
            (file,),
            methods=(envelope.method,),
            options={key: value for key, value in envelope.config.items() if key != "method"},
            base=envelope.base or "",
            base_revision=envelope.base_revision or "",
            tokens=max((stop for _, stop in envelope.rows.values()), default=0),
            host=envelope.host,
            classes=envelope.classes,
            sites=unique(_place(site) for site in sites),
            trained={each: file.shapes[name] for each, name in names.items() if name in file.shapes},
            problem=trouble(lambda: options_of(method_of(envelope), envelope)),
        )

    def files(self, injection: Injection, weights: bool = False) -> Files:
        held = [tensor for _, module in injection.modules() for tensor in module.state_dict(keep_vars=True).values()]
        if len(set(map(id, held))) != len(held):
            raise PluginError(
                f"{injection.method.name} registers a tensor twice: keep the object that surgeon.own returns, and do "
                "not register its module as a child"
            )
        rows = added_rows(injection)
        envelope = envelope_of(injection, weights, spans(rows))
        tensors = injection.state_dict() | _tensors_of_rows(rows, injection.wishes.dtype)
        return {TENSORS: Tensors(tensors, {METADATA: envelope.short}), ENVELOPE: envelope.text}


def _tensors_of_rows(rows: Mapping[str, AddedRows], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the rows that were added to token tables as tensors, keyed by their names in files."""
    held = {f"{path}:rows.value": each.weight[each.start :] for path, each in rows.items()}
    held |= {f"{path}:rows.bias": each.bias[each.start :] for path, each in rows.items() if each.bias is not None}
    return {name: value.to(dtype) for name, value in held.items()}


def _read(path: Path) -> tuple[TensorFile, Envelope]:
    file = TensorFile(path / TENSORS if path.is_dir() else path)
    if METADATA not in file.metadata:
        raise CheckpointError(f"{file.path} lacks the metadata {METADATA!r}, which describes an adapter of peftcore")
    return file, parse_envelope(parse_json(file.metadata[METADATA], file.path), file.path)


def _place(site: SavedSite) -> str:
    """Returns the path of a site as it is shown to the user."""
    tensor = "" if site.tensor == "weight" else site.tensor
    path = f"{site.module_path}.{tensor}".strip(".")
    return path if site.rows is None else f"{path}:{site.role or site.rows[0][0]}"


class NativeContent(Content):
    """The content of a file in peftcore's own format, whose tensors need no translation of names."""

    def __init__(self, envelope: Envelope, file: TensorFile, move: Move, left: tuple[str, ...] = ()) -> None:
        super().__init__(envelope, file.path)
        self.file = file
        self.move = move
        self.left = left
        """Prefixes of the names of tensors that belong to no module of the host."""

    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        names = {_moved_key(key, self.move): key for key in self.file.shapes if not key.startswith(self.left)}
        plan = Plan.of(surgeon)
        shapes = {name: self.file.shapes[key] for name, key in names.items()}
        dtypes = {name: self.file.dtypes[key] for name, key in names.items()}
        wrong = plan.differences(shapes, dtypes, strict)
        if wrong:
            raise CheckpointError(f"{self.where}: {'; '.join(wrong)}")
        values = self.file.read(key for name, key in names.items() if name in plan.shapes)
        return {name: values[key] for name, key in names.items() if key in values}


def moved(envelope: Envelope, move: Move) -> Envelope:
    """Returns a copy of the envelope in which `move` has changed all paths into the host's paths."""
    if move == Move():
        return envelope
    selections = {
        key: tuple(site.model_copy(update={"module_path": move(site.module_path)}) for site in sites)
        for key, sites in envelope.selections.items()
    }
    overrides = envelope.config.get("overrides")
    config = dict(envelope.config)
    if isinstance(overrides, dict):
        config["overrides"] = {move(key) if move.covers(key) else key: each for key, each in overrides.items()}
    update = {
        "selections": selections,
        "config": config,
        "train": tuple(map(move, envelope.train)),
        "untied": tuple(map(move, filter(move.covers, envelope.untied))),
        # A host with more around the encoder may have more that is tied to it, such as a head.
        "ties": None if envelope.ties is None or move.new else _moved_ties(envelope.ties, move),
        "rows": {move(path): span for path, span in envelope.rows.items()},
    }
    return envelope.model_copy(update=update)


def _moved_ties(ties: Mapping[str, tuple[str, ...]], move: Move) -> dict[str, tuple[str, ...]]:
    """Returns `Envelope.ties` with the host's paths. Paths of modules outside of the part that the file's model and the
    host have in common are left out."""
    return {_moved_key(key, move): tuple(map(move, filter(move.covers, paths))) for key, paths in ties.items()}


def _moved_key(key: str, move: Move) -> str:
    """Returns the host's name for a tensor ``part/part/path.tensor`` in the file. Names of shared state have no path
    and do not change."""
    part, slash, name = key.rpartition("/")
    return key if name.startswith("shared:") else f"{part}{slash}{move(name)}"
