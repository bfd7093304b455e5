"""Reads a kohya file for one host: finds the method for each module, and the operator for each tensor.

Paths in the file use the host's module names or the names in the model's original code; both are tried. A method is
recognized by the names of a module's tensors. Fused modules of the original code are split into the host's modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Size, Tensor, nn

from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import CheckpointError, HostMismatch
from peftcore.files.envelope import SavedSite
from peftcore.files.formats.bundled_embeddings import (
    FRONT,
    OUTPUTS,
    PICTURES,
    counts,
    is_known,
    is_word,
    read_words,
    taken_apart,
)
from peftcore.files.formats.composing import composed, with_overrides
from peftcore.files.formats.file_tensors import Found
from peftcore.files.formats.format import Content
from peftcore.files.formats.kohya_method import (
    ALPHA,
    VECTORS,
    Held,
    KohyaMethod,
    Piece,
    added,
    kohya_methods,
    method_of,
)
from peftcore.files.formats.kohya_names import part_of, understood
from peftcore.files.formats.kohya_spelling import Spelling
from peftcore.files.formats.original_names import OriginalModule, original_names
from peftcore.files.formats.pipelines import (
    PipelinePart,
    fitting,
    split,
)
from peftcore.files.formats.translated_operators import Place
from peftcore.files.safe_io import TensorFile, parse_json
from peftcore.registry.plugins import layer_of
from peftcore.roles.token_tables import tables_by_path

DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
"""The dropout options of training programs."""
ARGUMENTS = "ss_network_args"
"""The header's key for the network arguments of sd-scripts, a JSON object of texts."""


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors that the file has for one module."""

    path: str
    names: Mapping[str, str]
    """Full names of the tensors, keyed by the part of the name below the module."""
    held: Held


@dataclass(frozen=True)
class MethodGroups:
    """The modules of the file that belong to one method."""

    method: KohyaMethod
    groups: list[ModuleTensors]


class KohyaContent(Content):
    """The content of a kohya file for one host."""

    def __init__(self, file: TensorFile, model: nn.Module, words: Mapping[str, Sequence[int]] = {}) -> None:
        self.file = file
        self.methods = kohya_methods()
        self.cuts: dict[str, Tensor] = {}
        """Tensors that were split from tensors of the file, each for one module of the host. The keys are new names."""
        modules = dict(model.named_modules())
        originals = original_names(modules)
        stems = split([full for full in file.shapes if not is_word(full)], part_of)
        self.strange = [] if set(stems) == {""} else stems.pop("", [])
        readings = [
            (self._part(name, held, spelling), spelling)
            for spelling in (Spelling(modules), *([Spelling(modules, originals)] if originals else []))
            for name, held in stems.items()
        ]
        if stems.keys() <= PICTURES and words:  # nothing else is for a text encoder
            readings = [(PipelinePart("", {}, {}), Spelling(modules))]
        elif not stems:
            raise CheckpointError(f"{file.path} contains only words: {_how_to_load(counts(file.shapes))}")
        part, move = fitting([each for each, _ in readings], model, file.path)
        spelling = next(spelling for each, spelling in readings if each is part)
        names: dict[str, dict[str, str]] = {}
        meant: dict[str, OriginalModule] = {}
        for full in part.names:
            name = understood(full, part.name)
            below = names.setdefault(name.stem, {})
            if name.leaf in below:
                raise CheckpointError(f"{file.path}: {below[name.leaf]} and {full} are the same tensor")
            below[name.leaf] = full
            meant[name.stem] = spelling.only(move(name.path))
        numbers = self._numbers(names)
        self.added: dict[str, str] = {}
        """Maps the path of a tensor of the host to the name of the tensor in the file that is added to it."""
        groups = []
        for stem, below in names.items():
            for path in meant[stem].paths:
                if not spelling.has_weight(path):
                    raise HostMismatch(f"{file.path}: {stem} is for {path}, which has no weight here")
            if not meant[stem].whole:
                groups += self._cut(stem, below, numbers[stem].get(ALPHA), meant[stem], modules)
                continue
            (path,) = meant[stem].paths
            below = self._own(path, below, modules[path])
            shapes = {leaf: file.shapes[full] for leaf, full in below.items() if leaf != ALPHA}
            told = numbers[stem]
            groups.append(
                ModuleTensors(path, below, self._held(stem, told.pop(ALPHA, None), shapes, modules[path], told))
            )
        groups += self._words(model, words, part.name)
        if len({group.path for group in groups}) < len(groups):
            raise CheckpointError(f"{file.path} has two names for the same module")
        order = {path: index for index, path in enumerate(modules)}
        groups.sort(key=lambda group: order[group.path])
        self.shares = self._shares(groups)
        envelope = composed(
            [
                {"method": share.method.methods[0]}
                | with_overrides({g.path: share.method.options(g.held) for g in share.groups})
                | self._dropouts(share.method)
                for share in self.shares
            ],
            [{"": [SavedSite(module_path=group.path) for group in share.groups]} for share in self.shares],
            dtypes=file.dtypes.values(),
            target=[group.path for group in groups],
            train=tuple(self.added),
        )
        super().__init__(envelope, file.path)

    def _words(self, model: nn.Module, ids: Mapping[str, Sequence[int]], part: str) -> list[ModuleTensors]:
        """Returns the vectors of the file's words as tensors of the host's token embedding; empty without `ids`. Words
        that are not read are recorded in `self.strange`, if they may be for this host."""
        held = [full for full in self.file.shapes if is_word(full)]
        unread = [full for full in held if not is_known(full)]
        if not ids:
            here = held if tables_by_path(model) else unread
            how = f": {_how_to_load(counts(self.file.shapes))}"
            self.strange += [f"{full}{how if is_known(full) else ''}" for full in here]
            return []
        read = read_words(self.file, model, ids, part)
        words = set(counts(self.file.shapes)).difference(ids)
        unread += [full for full in held if taken_apart(full)[0] in words or taken_apart(full)[1].endswith(OUTPUTS)]
        self.strange += list(dict.fromkeys(unread))
        name = f"{FRONT}{','.join(ids)}"
        self.cuts[name] = read.vectors
        module = model.get_submodule(read.path)
        weight = Size(layer_of(module, "weight").shape(module, "weight"))
        where = f"{self.file.path}: {name}"
        return [
            ModuleTensors(
                read.path,
                {VECTORS: name},
                Held({VECTORS: read.vectors.shape}, None, weight, where, {}, False, read.tokens),
            )
        ]

    def _own(self, path: str, below: Mapping[str, str], module: nn.Module) -> dict[str, str]:
        """Returns the names of a module's tensors, without those that are added to tensors of the host.

        Raises:
            HostMismatch: the host has no such tensor.
        """
        beside = added(self.methods, {leaf: self._shape(full) for leaf, full in below.items()})
        for leaf, tensor in beside.items():
            if not layer_of(module, "weight").has(module, tensor):
                raise HostMismatch(f"{self.file.path}: {below[leaf]} is for a {tensor}, and {path} has no {tensor}")
            self.added[f"{path}.{tensor}"] = below[leaf]
        return {leaf: full for leaf, full in below.items() if leaf not in beside}

    def _shape(self, name: str) -> Size:
        return self.cuts[name].shape if name in self.cuts else self.file.shapes[name]

    def _held(
        self, stem: str, alpha: float | None, shapes: Mapping[str, Size], module: nn.Module, told: Mapping[str, float]
    ) -> Held:
        layer = layer_of(module, "weight")
        weight, bias = Size(layer.shape(module, "weight")), layer.has(module, "bias")
        return Held(shapes, alpha, weight, f"{self.file.path}: {stem}", told, bias)

    def _cut(
        self,
        stem: str,
        below: Mapping[str, str],
        alpha: float | None,
        original: OriginalModule,
        modules: Mapping[str, nn.Module],
    ) -> list[ModuleTensors]:
        """Returns the tensors of one module of the original code, split into those of the host's modules.

        Raises:
            CheckpointError: no installed plugin reads them, or they cannot be split.
        """
        full = {leaf: name for leaf, name in below.items() if leaf != ALPHA}
        method = method_of(self.methods, {leaf: self.file.shapes[name] for leaf, name in full.items()})
        if method is None:
            raise CheckpointError(f"{self.file.path}: no installed plugin reads {', '.join(sorted(full))} at {stem}")
        values = self.file.read(full.values())
        sizes = [layer_of(modules[path], "weight").shape(modules[path], "weight")[0] for path in original.paths]
        try:
            pieces = method.cut(Piece(alpha, {leaf: values[name] for leaf, name in full.items()}), sizes)
        except CheckpointError as error:
            where = f"{self.file.path}: {stem}, which is {', '.join(original.paths)} here"
            raise CheckpointError(f"{where}: {error}") from None
        groups = []
        for path, piece in zip(original.paths, pieces, strict=True):
            if piece is None:
                continue
            tensors = (method.swapped(piece) if original.swapped else piece).tensors
            names = {leaf: f"{full[leaf]} for {path}" for leaf in tensors}
            self.cuts |= {names[leaf]: value for leaf, value in tensors.items()}
            names = self._own(path, names, modules[path])
            shapes = {leaf: tensors[leaf].shape for leaf in names}
            groups.append(ModuleTensors(path, names, self._held(stem, piece.alpha, shapes, modules[path], {})))
        return groups

    def _part(self, name: str, held: Sequence[str], spelling: Spelling) -> PipelinePart:
        below: dict[str, dict[str, Size]] = {}
        for full in held:
            said = understood(full, name)
            below.setdefault(said.path, {})[said.leaf] = self.file.shapes[full]
        outputs = {}
        for path, shapes in below.items():
            method = method_of(self.methods, shapes)
            several = any(not each.whole for each in spelling.meant.get(path, ()))
            outputs[path] = -1 if method is None or several else method.outputs(shapes)
        return PipelinePart(name, {full: full for full in held}, outputs, spelling.places)

    def _dropouts(self, method: KohyaMethod) -> dict[str, Any]:
        """Returns the dropout options that were used in training according to the file. A warning is shown for dropouts
        that peftcore's method does not support."""
        told = _trained_with(self.file)
        lacking = [f"{name} = {told[name]}" for name in told if name in DROPOUTS and name not in method.dropouts]
        if lacking:
            warnings.warn(
                f"{self.file.path} was trained with {', '.join(lacking)}, which {method.methods[0]} does not support "
                "in this form: outputs are the same, further training differs",
                UserWarning,
                stacklevel=2,
            )
        return {name: value for name, value in told.items() if name in method.dropouts}

    def _numbers(self, names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, float]]:
        """Returns the values of all tensors with a single number, such as alpha. They are keyed by module, then by the
        part of the name below the module."""
        shapes = self.file.shapes
        for full in (below[ALPHA] for below in names.values() if ALPHA in below):
            if shapes[full].numel() != 1:
                raise CheckpointError(f"{self.file.path}: {full} has shape {tuple(shapes[full])}, expected one number")
        single = {stem: {leaf: full for leaf, full in below.items() if shapes[full].numel() == 1}
                  for stem, below in names.items()}  # fmt: skip
        values = self.file.read([full for below in single.values() for full in below.values()])
        return {stem: {leaf: float(values[full]) for leaf, full in below.items()} for stem, below in single.items()}

    def _shares(self, groups: Sequence[ModuleTensors]) -> list[MethodGroups]:
        """Returns the methods that read the modules, each with its modules. The method that reads most modules is
        first.

        Raises:
            CheckpointError: no installed plugin reads the tensors of a module.
        """
        left, found = list(groups), list[MethodGroups]()
        while left:
            counts = [sum(method.fits(group.held) for group in left) for method in self.methods]
            most = max(counts, default=0)
            if not most:
                shown = [f"{', '.join(sorted(g.names))} at {g.held.where.rpartition(': ')[2]}" for g in left[:4]]
                raise CheckpointError(f"{self.file.path}: no installed plugin reads {'; '.join(shown)}")
            method = self.methods[counts.index(most)]
            found.append(MethodGroups(method, [group for group in left if method.fits(group.held)]))
            left = [group for group in left if not method.fits(group.held)]
        return found

    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        every = [full for share in self.shares for group in share.groups for full in group.names.values()]
        every += self.added.values()
        values = self.file.read([full for full in every if full not in self.cuts]) | self.cuts
        shapes = self.file.shapes | {full: value.shape for full, value in self.cuts.items()}
        wrong, used = [f"unknown {name}" for name in self.strange], set[str]()
        tensors: dict[str, Tensor] = {}
        for index, share in enumerate(self.shares):
            recorder = surgeon.parts[str(index)] if len(self.shares) > 1 else surgeon
            here = {group.path: group for group in share.groups}
            grafts = [graft for graft in recorder.grafts if graft.by_method]
            for number, graft in enumerate(grafts):
                group = here[graft.site.module_path]
                found = Found(group.names, shapes, values.__getitem__, wrong, used)
                place = Place(graft, number, len(grafts), recorder.config.at(graft.site.path))
                before = len(wrong)
                read = share.method.read(place, found)
                if len(wrong) == before:  # a place that lacks something stays as it is, where that is accepted
                    tensors |= {f"{graft.key}.{name}": value for name, value in read.items()}
        for graft in surgeon.grafts:
            if graft.trained_along:
                full = self.added[f"{graft.site.module_path}.{graft.site.tensor}"]
                own = replace(graft.site, meta=False).base_weight().detach()
                change = Found({full: full}, shapes, values.__getitem__, wrong, used).take(full, own.shape)
                tensors[f"{graft.key}.value"] = own.to(change) + change
        used |= {full for full in every if full.endswith(f".{ALPHA}")}
        wrong += [f"unknown {name}" for name in sorted(set(every) - used)]
        if strict and wrong:
            raise CheckpointError(f"{self.where}: {'; '.join(dict.fromkeys(wrong))}")
        return tensors


def _how_to_load(words: Mapping[str, int]) -> str:
    shown = ", ".join(f"{word!r}: [{'id, ' * (count - 1)}id]" for word, count in words.items())
    return f"load words into a text encoder with their ids in the tokenizer, words={{{shown}}}"


def _trained_with(file: TensorFile) -> dict[str, float | bool]:
    """Returns the dropouts that the training program recorded in the header, if they are above 0."""
    noted = {"dropout": file.metadata.get("ss_network_dropout")}
    with suppress(CheckpointError):  # it is nothing that an adapter is made of
        noted |= parse_json(file.metadata.get(ARGUMENTS, "{}"), file.path)
    found: dict[str, float | bool] = {}
    for name in DROPOUTS:
        with suppress(ValueError):
            value = float(str(noted.get(name)))
            found |= {name: value} if 0 < value < 1 else {}
    scaled = str(noted.get("rank_dropout_scale")).lower() == "true"
    return found | ({"rank_dropout_scale": True} if scaled and "rank_dropout" in found else {})
