"""Files of kohya's sd-scripts, of LyCORIS and for ComfyUI: one safetensors file for a model or for a pipeline.

A tensor is called ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``: the model, the module's path with
underscores for dots, the tensor. The host's own modules, or their names in the original code (`original_names`), tell
which underscores are dots. There are no options: rank and form follow from shapes, and the scale is alpha / rank with
an ``alpha`` for each module. Only the dropouts of its training are in the header, where the training program notes
them. A method's tensors are translated by a `KohyaMethod`, which the plugin of our method brings under
``"kohya/NAME"``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.errors import CheckpointError, ExportError, HostMismatch
from peftcore.files.added_rows import check_no_rows
from peftcore.files.envelope import SavedSite
from peftcore.files.formats.composing import composed, with_overrides
from peftcore.files.formats.description import Description, unique
from peftcore.files.formats.format import Content, Files, Format, Tensors
from peftcore.files.formats.found import Found
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
from peftcore.files.formats.kohya_names import DIFFUSION, PARTS, are_known, part_of, stem_of, understood
from peftcore.files.formats.original_names import Original, is_transformer, original_names, written_names
from peftcore.files.formats.pipelines import (
    Part,
    clip_prefix,
    fitting,
    is_text_encoder,
    is_unet,
    names_in,
    only_file,
    split,
)
from peftcore.files.formats.places import Place
from peftcore.files.formats.words import (
    FRONT,
    OUTPUTS,
    PICTURES,
    bundled,
    counts,
    is_known,
    is_word,
    read_words,
    taken_apart,
)
from peftcore.files.safe_io import TensorFile, parse_json
from peftcore.injection.injection import Injection
from peftcore.registry.plugins import layer_of
from peftcore.roles.token_tables import tables_by_path
from peftcore.surgery.surgeon import Graft, Surgeon

TENSORS = "kohya.safetensors"
"""The file that we write into a folder; any file that is the only one is read."""
UNET, OURS = "lora_unet", "lycoris"
"""The model that makes pictures, in its original names where these are known; and in the host's own names."""
DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
"""The dropouts that training programs have."""
ARGUMENTS = "ss_network_args"
"""The key of the header under which sd-scripts notes the arguments of a network, as JSON of texts."""


class Kohya(Format):
    """The format of kohya's sd-scripts, of LyCORIS and for ComfyUI."""

    name = "kohya"
    file = TENSORS
    parts: ClassVar[tuple[str, ...]] = (*PARTS, DIFFUSION)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return are_known(names_in(only_file(path, TENSORS)))

    def open(self, path: Path, model: nn.Module) -> Content:
        return self.open_with_words(path, model, {})

    def open_with_words(self, path: Path, model: nn.Module, words: Mapping[str, Sequence[int]]) -> Content:
        return KohyaContent(TensorFile(only_file(path, TENSORS) or path / TENSORS), model, words)

    def describe(self, path: Path) -> Description:
        file = TensorFile(only_file(path, TENSORS) or path / TENSORS)
        stems: dict[str, dict[str, Size]] = {}
        for full, shape in file.shapes.items():
            if is_word(full):
                continue
            said = understood(full, part_of(full) or "")
            stems.setdefault(said.stem, {})[said.leaf] = shape
        known = kohya_methods()
        found = {stem: method_of(known, shapes) for stem, shapes in stems.items()}
        strange = [stem for stem, method in found.items() if method is None]
        return Description(
            self.name,
            (file,),
            methods=unique(method.methods[0] for method in found.values() if method is not None),
            parts=unique(part for full in file.shapes if (part := part_of(full))),
            sites=tuple(stems),
            words=counts(file.shapes),
            problem=f"no installed plugin reads what is at {', '.join(strange[:4])}" if strange else "",
        )

    def files(self, injection: Injection, weights: bool = False) -> Files:
        if injection.shared:
            raise ExportError(f"files of kohya have no place for {next(iter(injection.shared))}: only for modules")
        part = self.part or _guessed(injection.model)
        if part == "oft_unet":
            raise ExportError("oft_unet is read only, from sd-scripts' networks/oft.py; LyCORIS reads lora_unet")
        modules = dict(injection.model.named_modules())
        spelling = Spelling(modules)
        methods, noted = kohya_methods(), set[str]()
        held: dict[str, tuple[KohyaMethod, Piece]] = {}
        standing: dict[str, tuple[str, set[str]]] = {}
        words: dict[str, Tensor] = {}
        rows: dict[str, list[int]] = {}
        for index, graft in enumerate(injection.grafts):
            site, owner = graft.site, injection.owner(graft)
            if graft.trained_along:
                continue
            able = [each for each in methods if owner.method.name in each.methods]
            if not able:
                raise ExportError(f"files of kohya have no method that computes what {owner.method.name} does")
            place = Place(graft, index, len(injection.grafts), owner.config.at(site.path))
            method = next((each for each in able if each.writes(place)), able[-1])
            if tokens := method.tokens(place):
                bundle = bundled(part, tokens, method.write(place)[1][VECTORS])
                if not words.keys().isdisjoint(bundle):
                    raise ExportError(f"two tables have the words {', '.join(bundle)}, and files of kohya have one")
                words |= bundle
                rows |= {each.module_path: [index for _, index in tokens] for each in graft.holders}
                continue
            one_hot = layer_of(site.module, "weight").one_hot
            if site.tensor not in method.tensors or site.slices is not None or site.batch or one_hot:
                raise ExportError(
                    f"files of kohya hold linear maps, convolutions and norms as a whole, and not {site.path}; exclude "
                    "it"
                )
            spelling.only(site.module_path)
            first, taken = standing.setdefault(site.module_path, (graft.part, set()))
            if first != graft.part or site.tensor in taken:
                raise ExportError(f"files of kohya have one operator for a module; {site.path} has two")
            taken.add(site.tensor)
            if method.dropouts:
                noted.add(json.dumps({n: str(v) for n in method.dropouts if (v := getattr(place.config, n))}))
            alpha, values = method.write(place)
            before = held[site.module_path][1].tensors if site.module_path in held else {}
            held[site.module_path] = method, Piece(alpha, {**before, **values})
        for graft in injection.grafts:
            if graft.trained_along:
                _add(held, graft)
        check_no_rows(injection, "kohya", rows)
        if len(noted) > 1:
            raise ExportError("files of kohya have the same dropouts for all modules, and here they differ")
        (said,) = noted or {"{}"}
        front, tensors = clip_prefix(injection.model) if part.startswith("lora_te") else "", dict(words)
        original = part == DIFFUSION or (part == UNET and not is_unet(injection.model))
        for path, piece in _named(held, modules, original_names(modules) if original else {}).items():
            stem = stem_of(part, front + path)
            if piece.alpha is not None:
                tensors[f"{stem}.{ALPHA}"] = torch.tensor(float(piece.alpha), dtype=torch.float32)
            tensors |= {f"{stem}.{name}": value.detach().contiguous() for name, value in piece.tensors.items()}
        return {TENSORS: Tensors(tensors, {"format": "pt"} if said == "{}" else {ARGUMENTS: said})}


def _guessed(model: nn.Module) -> str:
    """Returns the name in files for a host."""
    if is_unet(model) or is_transformer([path for path, _ in model.named_modules()]):
        return UNET
    return "lora_te" if is_text_encoder(model) else OURS


def _add(held: dict[str, tuple[KohyaMethod, Piece]], graft: Graft) -> None:
    """Put what trained along into what is at its module.

    Raises:
        ExportError: there is no place for it.
    """
    site = graft.site
    method, piece = held.get(site.module_path, (None, Piece(None, {})))
    name = next((leaf for leaf, tensor in method.beside.items() if tensor == site.tensor), None) if method else None
    if method is None or name is None:
        raise ExportError(
            f"files of kohya have no place for {site.path}: only for operators at modules, and for the biases beside "
            "those of LoRA"
        )
    value: Tensor = graft.operator.state_dict()["value"]
    change = value - replace(site, meta=False).base_weight().detach().to(value)
    held[site.module_path] = method, Piece(piece.alpha, {**piece.tensors, name: change})


def _named(
    held: Mapping[str, tuple[KohyaMethod, Piece]], modules: Mapping[str, nn.Module], originals: Mapping[str, Original]
) -> dict[str, Piece]:
    """Returns what is to be written by original names, those of several modules as one.

    Raises:
        ExportError: these do not do what one does.
    """
    theirs, found = written_names(originals), dict[str, Piece]()
    for name in dict.fromkeys(theirs.get(path, path) for path in held):
        original = originals.get(name, Original((name,)))
        pieces = [held.get(path) for path in original.paths]
        method, piece = next(each for each in pieces if each is not None)
        if not original.whole:
            if any(each is not None and each[0] is not method for each in pieces):
                raise ExportError(_not_one(name, original, "they have different methods"))
            sizes = [layer_of(modules[path], "weight").shape(modules[path], "weight")[0] for path in original.paths]
            try:
                piece = method.joined([None if each is None else each[1] for each in pieces], sizes)
                piece = method.swapped(piece) if original.swapped else piece
            except ExportError as error:
                raise ExportError(_not_one(name, original, str(error))) from None
        found[name] = piece
    return found


def _not_one(name: str, original: Original, why: str) -> str:
    return (
        f"{', '.join(original.paths)} cannot be written as {name}: {why}; the part {OURS!r}, as in "
        f'format="kohya/{OURS}", keeps the modules of the host'
    )


class Spelling:
    """A host's modules by their paths, or by names of the original code, with dots and underscores taken as one."""

    def __init__(self, modules: Mapping[str, nn.Module], originals: Mapping[str, Original] = {}) -> None:
        self.modules = modules
        self.meant: dict[str, list[Original]] = {}
        for path in modules:
            self.meant.setdefault(path.replace("_", "."), []).append(Original((path,)))
        self.meant |= {name.replace("_", "."): [original] for name, original in originals.items()}

    @property
    def places(self) -> dict[str, str]:
        """One path for each spelling; see `only`."""
        return {spelling: meant[0].paths[0] for spelling, meant in self.meant.items()}

    def only(self, path: str) -> Original:
        """Returns the module with a weight for the spelling of `path`.

        Raises:
            HostMismatch: there are several.
        """
        meant = self.meant[path.replace("_", ".")]
        if len(meant) > 1:
            weighty = [each for each in meant if self.has_weight(each.paths[0])]
            if len(weighty) > 1:
                several = " and ".join(each.paths[0] for each in weighty)
                raise HostMismatch(f"with underscores for dots {several} are one name")
            meant = weighty or meant
        return meant[0]

    def has_weight(self, path: str) -> bool:
        """Whether the host's module has a weight."""
        return layer_of(self.modules[path], "weight").has(self.modules[path], "weight")


@dataclass(frozen=True)
class Group:
    """The tensors at one module."""

    path: str
    names: Mapping[str, str]
    """Full names by their names below the module."""
    held: Held


@dataclass(frozen=True)
class Share:
    """The modules that one method reads."""

    method: KohyaMethod
    groups: list[Group]


class KohyaContent(Content):
    """An adapter of such a file for one host."""

    def __init__(self, file: TensorFile, model: nn.Module, words: Mapping[str, Sequence[int]] = {}) -> None:
        self.file = file
        self.methods = kohya_methods()
        self.cuts: dict[str, Tensor] = {}
        """What was cut out of tensors of the file, by names of its own."""
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
            readings = [(Part("", {}, {}), Spelling(modules))]
        elif not stems:
            raise CheckpointError(f"{file.path} has words alone: {_how_to_load(counts(file.shapes))}")
        part, move = fitting([each for each, _ in readings], model, file.path)
        spelling = next(spelling for each, spelling in readings if each is part)
        names: dict[str, dict[str, str]] = {}
        meant: dict[str, Original] = {}
        for full in part.names:
            name = understood(full, part.name)
            below = names.setdefault(name.stem, {})
            if name.leaf in below:
                raise CheckpointError(f"{file.path}: {below[name.leaf]} and {full} are the same tensor")
            below[name.leaf] = full
            meant[name.stem] = spelling.only(move(name.path))
        numbers = self._numbers(names)
        self.added: dict[str, str] = {}
        """Names of tensors that are added to tensors of the host, by the path of these."""
        groups = []
        for stem, below in names.items():
            for path in meant[stem].paths:
                if not spelling.has_weight(path):
                    raise HostMismatch(f"{file.path}: {stem} stands at {path}, which has no weight here")
            if not meant[stem].whole:
                groups += self._cut(stem, below, numbers[stem].get(ALPHA), meant[stem], modules)
                continue
            (path,) = meant[stem].paths
            below = self._own(path, below, modules[path])
            shapes = {leaf: file.shapes[full] for leaf, full in below.items() if leaf != ALPHA}
            told = numbers[stem]
            groups.append(Group(path, below, self._held(stem, told.pop(ALPHA, None), shapes, modules[path], told)))
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

    def _words(self, model: nn.Module, ids: Mapping[str, Sequence[int]], part: str) -> list[Group]:
        """Returns what the words of the file are at the host's table; what is not read of them is strange, where it
        may be for this host."""
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
            Group(
                read.path,
                {VECTORS: name},
                Held({VECTORS: read.vectors.shape}, None, weight, where, {}, False, read.tokens),
            )
        ]

    def _own(self, path: str, below: Mapping[str, str], module: nn.Module) -> dict[str, str]:
        """Returns the names of a module's tensors without those that are added to the host's.

        Raises:
            HostMismatch: the host has no such tensor.
        """
        beside = added(self.methods, {leaf: self._shape(full) for leaf, full in below.items()})
        for leaf, tensor in beside.items():
            if not layer_of(module, "weight").has(module, tensor):
                raise HostMismatch(f"{self.file.path}: {below[leaf]} is added to a {tensor}, which {path} has not")
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
        original: Original,
        modules: Mapping[str, nn.Module],
    ) -> list[Group]:
        """Returns what the tensors at one module of the original code are at the host's.

        Raises:
            CheckpointError: no installed plugin reads them, or they cannot be cut.
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
            groups.append(Group(path, names, self._held(stem, piece.alpha, shapes, modules[path], {})))
        return groups

    def _part(self, name: str, held: Sequence[str], spelling: Spelling) -> Part:
        below: dict[str, dict[str, Size]] = {}
        for full in held:
            said = understood(full, name)
            below.setdefault(said.path, {})[said.leaf] = self.file.shapes[full]
        outputs = {}
        for path, shapes in below.items():
            method = method_of(self.methods, shapes)
            several = any(not each.whole for each in spelling.meant.get(path, ()))
            outputs[path] = -1 if method is None or several else method.outputs(shapes)
        return Part(name, {full: full for full in held}, outputs, spelling.places)

    def _dropouts(self, method: KohyaMethod) -> dict[str, Any]:
        """Returns the dropouts with which the file says that it was trained, as our options. Where ours has none of the
        kind, a warning is given."""
        told = _trained_with(self.file)
        lacking = [f"{name} = {told[name]}" for name in told if name in DROPOUTS and name not in method.dropouts]
        if lacking:
            warnings.warn(
                f"{self.file.path} was trained with {', '.join(lacking)}, which {method.methods[0]} has not in this "
                "form: outputs are the same without, further training is not",
                UserWarning,
                stacklevel=2,
            )
        return {name: value for name, value in told.items() if name in method.dropouts}

    def _numbers(self, names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, float]]:
        """Returns the values of what is one number, alpha among them, by their names below each module."""
        shapes = self.file.shapes
        for full in (below[ALPHA] for below in names.values() if ALPHA in below):
            if shapes[full].numel() != 1:
                raise CheckpointError(f"{self.file.path}: {full} has shape {tuple(shapes[full])}, expected one number")
        single = {stem: {leaf: full for leaf, full in below.items() if shapes[full].numel() == 1}
                  for stem, below in names.items()}  # fmt: skip
        values = self.file.read([full for below in single.values() for full in below.values()])
        return {stem: {leaf: float(values[full]) for leaf, full in below.items()} for stem, below in single.items()}

    def _shares(self, groups: Sequence[Group]) -> list[Share]:
        """Returns as few methods as can read all modules, the one that reads most first.

        Raises:
            CheckpointError: no installed plugin reads the tensors of a module.
        """
        left, found = list(groups), list[Share]()
        while left:
            counts = [sum(method.fits(group.held) for group in left) for method in self.methods]
            most = max(counts, default=0)
            if not most:
                shown = [f"{', '.join(sorted(g.names))} at {g.held.where.rpartition(': ')[2]}" for g in left[:4]]
                raise CheckpointError(f"{self.file.path}: no installed plugin reads {'; '.join(shown)}")
            method = self.methods[counts.index(most)]
            found.append(Share(method, [group for group in left if method.fits(group.held)]))
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
    """Returns the dropouts that the training program noted in the header, those that are on."""
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
