"""Files of kohya's sd-scripts and of LyCORIS: one safetensors file for a model or for a pipeline.

A tensor is called ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``: the model, the module's path with
underscores for dots, the tensor. The host's own modules tell which underscores are dots. There are no
options: rank and form follow from shapes, and the scale is alpha / rank with an ``alpha`` for each module. Only the
dropouts of its training are in the header, where the training program notes them. A method's tensors are translated by
a `KohyaMethod`, which the plugin of our method brings under ``"kohya/NAME"``.
"""

from __future__ import annotations

import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
from peftcore.files.formats.ldm_names import ldm_names
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
from peftcore.files.safe_io import TensorFile, parse_json
from peftcore.injection.injection import Injection
from peftcore.registry.plugins import imported, layer_of, named_places
from peftcore.surgery.surgeon import Surgeon

TENSORS = "kohya.safetensors"
"""The file that we write into a folder; any file that is the only one is read."""
ALPHA = "alpha"
DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
"""The dropouts that training programs have."""
ARGUMENTS = "ss_network_args"
"""The key of the header under which sd-scripts notes the arguments of a network, as JSON of texts."""


@dataclass(frozen=True)
class Held:
    """The tensors that a file has for one module."""

    shapes: Mapping[str, Size]
    """Shapes of its tensors by their names below the module, without alpha."""
    given: float | None
    """The value of alpha, where there is one."""
    weight: Size
    """The logical shape of the host's weight: ``[out, in, *kernel]``."""
    where: str
    """The file and the module's name in it, for messages."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """The values of its tensors that are one number, by their names below the module."""
    bias: bool = False
    """Whether the host's module has a bias."""

    def size(self, name: str, dim: int) -> int:
        """Returns the size of a tensor in one dimension; 1 where it is missing: the file is refused later."""
        shape = self.shapes.get(name, ())
        return shape[dim] if dim < len(shape) and shape[dim] else 1

    def alpha(self, rank: int) -> float:
        """Returns alpha, which is the rank where the file has none.

        Raises:
            CheckpointError: it is not above zero.
        """
        if self.given is not None and not (self.given > 0 and math.isfinite(self.given)):
            raise CheckpointError(f"{self.where}: alpha is {self.given}, but peftcore reads only what is above 0")
        return float(rank if self.given is None else self.given)


class KohyaMethod(ABC):
    """The translation of one method between these files and ours."""

    methods: ClassVar[tuple[str, ...]]
    """Our methods that it can hold; the first is the one that is read."""
    below: ClassVar[tuple[str, ...]]
    """Names of its tensors below a module, without alpha."""
    telling: ClassVar[tuple[str, ...]]
    """The names of which a file of this method has at least one."""
    tensors: ClassVar[tuple[str, ...]] = ("weight",)
    """The host's tensors of a module that it changes."""
    dropouts: ClassVar[tuple[str, ...]] = ()
    """The dropouts of its training that our method has as well, by our names, which are those of the header."""

    @abstractmethod
    def options(self, held: Held) -> dict[str, Any]:
        """Returns our options for one module.

        Raises:
            CheckpointError: ours cannot compute it.
        """

    @abstractmethod
    def outputs(self, shapes: Mapping[str, Size]) -> int:
        """Returns the number of outputs of a module, from the shapes of its tensors; -1 where they do not tell."""

    @abstractmethod
    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        """Returns one operator's tensors by our names."""

    @abstractmethod
    def write(self, place: Place) -> tuple[float | None, dict[str, Tensor]]:
        """Returns alpha, None where the file has none, and one operator's tensors by the file's names.

        Raises:
            ExportError: the file cannot hold it.
        """

    def writes(self, place: Place) -> bool:
        """Whether it can hold what one of its methods does at a place. Where no translation can, `write` of the last
        one says why."""
        return True

    def reads(self, shapes: Mapping[str, Size]) -> bool:
        """Whether a module's tensors, of these shapes by their names below it, are of this method."""
        names = set(shapes) - {ALPHA}
        return names <= set(self.below) and not names.isdisjoint(self.telling)

    def fits(self, held: Held) -> bool:
        """Whether it reads what the file has for a module of the host: where several methods of ours share the names of
        theirs, one of them."""
        return self.reads(held.shapes)


def spelled(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the shapes that a matrix [a, b] may have in a file: pointwise convolutions are written as they are, or
    flat."""
    if math.prod(shape[2:]) != 1:
        return [tuple(shape)]
    flat = tuple(shape[:2])
    return [tuple(shape), flat, *((*flat, *[1] * count) for count in (1, 2, 3))]


def kohya_methods() -> list[KohyaMethod]:
    """Returns the translations of the installed plugins, the simplest first."""
    places = named_places("peftcore_translations", "translation")
    found: list[KohyaMethod] = [imported(places[name])() for name in sorted(places) if name.startswith("kohya/")]
    return sorted(found, key=lambda method: len(method.below))


class Kohya(Format):
    """The format of kohya's sd-scripts and of LyCORIS."""

    name = "kohya"
    file = TENSORS
    parts: ClassVar[tuple[str, ...]] = (
        "lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer", "lycoris", "oft_unet",
    )  # fmt: skip

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return any(map(_known, names_in(only_file(path, TENSORS))))

    def open(self, path: Path, model: nn.Module) -> Content:
        return KohyaContent(TensorFile(only_file(path, TENSORS) or path / TENSORS), model)

    def describe(self, path: Path) -> Description:
        file = TensorFile(only_file(path, TENSORS) or path / TENSORS)
        stems: dict[str, dict[str, Size]] = {}
        for full, shape in file.shapes.items():
            stem, _, leaf = full.partition(".")
            stems.setdefault(stem, {})[leaf] = shape
        known = kohya_methods()
        found = {stem: next((each for each in known if each.reads(shapes)), None) for stem, shapes in stems.items()}
        strange = [stem for stem, method in found.items() if method is None]
        return Description(
            self.name,
            (file,),
            methods=unique(method.methods[0] for method in found.values() if method is not None),
            parts=unique(part for stem in stems if (part := _known(stem))),
            sites=tuple(stems),
            problem=f"no installed plugin reads what is at {', '.join(strange[:4])}" if strange else "",
        )

    def files(self, injection: Injection, weights: bool = False) -> Files:
        if injection.trained_along or injection.shared:
            what = next(iter((*injection.trained_along, *injection.shared)))
            raise ExportError(f"files of kohya have no place for {what}: only for operators at modules")
        check_no_rows(injection, "kohya")
        model = injection.model
        part = self.part or ("lora_unet" if is_unet(model) else "lora_te" if is_text_encoder(model) else "lycoris")
        if part == "oft_unet":
            raise ExportError("oft_unet is read only, from sd-scripts' networks/oft.py; LyCORIS reads lora_unet")
        front = clip_prefix(model) if part.startswith("lora_te") else ""
        spelling = Spelling(dict(injection.model.named_modules()))
        methods, tensors, noted = kohya_methods(), dict[str, Tensor](), set[str]()
        standing: dict[str, tuple[str, set[str]]] = {}
        for index, graft in enumerate(injection.grafts):
            site, owner = graft.site, injection.owner(graft)
            able = [each for each in methods if owner.method.name in each.methods]
            if not able:
                raise ExportError(f"files of kohya have no method that computes what {owner.method.name} does")
            place = Place(graft, index, len(injection.grafts), owner.config.at(site.path))
            method = next((each for each in able if each.writes(place)), able[-1])
            one_hot = layer_of(site.module, "weight").one_hot
            if site.tensor not in method.tensors or site.slices is not None or site.batch or one_hot:
                raise ExportError(
                    f"files of kohya hold linear maps, convolutions and norms as a whole, and not {site.path}; exclude "
                    "it"
                )
            spelling.only(site.module_path)
            stem = f"{part}_{front}{site.module_path}".replace(".", "_")
            first, taken = standing.setdefault(stem, (graft.part, set()))
            if first != graft.part or site.tensor in taken:
                raise ExportError(f"files of kohya have one operator for a module; {site.path} has two")
            taken.add(site.tensor)
            if method.dropouts:
                noted.add(json.dumps({n: str(v) for n in method.dropouts if (v := getattr(place.config, n))}))
            alpha, values = method.write(place)
            if alpha is not None:
                tensors[f"{stem}.{ALPHA}"] = torch.tensor(float(alpha), dtype=torch.float32)
            tensors |= {f"{stem}.{name}": value.detach().contiguous() for name, value in values.items()}
        if len(noted) > 1:
            raise ExportError("files of kohya have the same dropouts for all modules, and here they differ")
        (said,) = noted or {"{}"}
        return {TENSORS: Tensors(tensors, {"format": "pt"} if said == "{}" else {ARGUMENTS: said})}


def _known(name: str) -> str | None:
    """Returns the model in front of a tensor's name."""
    stem = name.partition(".")[0]
    return next((part for part in Kohya.parts if stem.startswith(f"{part}_")), None)


class Spelling:
    """A host's modules by their paths with dots and underscores taken as one."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.paths: dict[str, list[str]] = {}
        for path in modules:
            self.paths.setdefault(path.replace("_", "."), []).append(path)
        for name, path in ldm_names(modules).items():
            self.paths.setdefault(name.replace("_", "."), [path])

    @property
    def places(self) -> dict[str, str]:
        """One path for each spelling; see `only`."""
        return {spelling: paths[0] for spelling, paths in self.paths.items()}

    def only(self, path: str) -> str:
        """Returns the module with a weight for the spelling of `path`.

        Raises:
            HostMismatch: there are several.
        """
        meant = self.paths[path.replace("_", ".")]
        if len(meant) > 1:
            weighty = [
                each for each in meant if layer_of(self.modules[each], "weight").has(self.modules[each], "weight")
            ]
            if len(weighty) > 1:
                raise HostMismatch(f"with underscores for dots {' and '.join(weighty)} are one name")
            meant = weighty or meant
        return meant[0]


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

    def __init__(self, file: TensorFile, model: nn.Module) -> None:
        self.file = file
        self.methods = kohya_methods()
        modules = dict(model.named_modules())
        spelling = Spelling(modules)
        stems = split(list(file.shapes), _known)
        self.strange = stems.pop("", [])
        parts = [self._part(name, held, spelling) for name, held in stems.items()]
        part, move = fitting(parts, model, file.path)
        names: dict[str, dict[str, str]] = {}
        for full in part.names:
            stem, _, leaf = full.partition(".")
            names.setdefault(stem, {})[leaf] = full
        numbers = self._numbers(names)
        groups = []
        for stem, below in names.items():
            path = spelling.only(spelling.places[move(_dotted(stem, part.name))])
            layer = layer_of(modules[path], "weight")
            if not layer.has(modules[path], "weight"):
                raise HostMismatch(f"{file.path}: {stem} stands at {path}, which has no weight here")
            shapes = {leaf: file.shapes[full] for leaf, full in below.items() if leaf != ALPHA}
            weight = Size(layer.shape(modules[path], "weight"))
            told, bias = numbers[stem], layer.has(modules[path], "bias")
            held = Held(shapes, told.pop(ALPHA, None), weight, f"{file.path}: {stem}", told, bias)
            groups.append(Group(path, below, held))
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
        )
        super().__init__(envelope, file.path)

    def _part(self, name: str, held: Sequence[str], spelling: Spelling) -> Part:
        below: dict[str, dict[str, Size]] = {}
        for full in held:
            stem, _, leaf = full.partition(".")
            below.setdefault(_dotted(stem, name), {})[leaf] = self.file.shapes[full]
        outputs = {}
        for path, shapes in below.items():
            method = next((each for each in self.methods if each.reads(shapes)), None)
            outputs[path] = -1 if method is None else method.outputs(shapes)
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
        values = self.file.read(every)
        wrong, used = [f"unknown {name}" for name in self.strange], set[str]()
        tensors: dict[str, Tensor] = {}
        for index, share in enumerate(self.shares):
            recorder = surgeon.parts[str(index)] if len(self.shares) > 1 else surgeon
            here = {group.path: group for group in share.groups}
            for number, graft in enumerate(recorder.grafts):
                group = here[graft.site.module_path]
                found = Found(group.names, self.file.shapes, values.__getitem__, wrong, used)
                place = Place(graft, number, len(recorder.grafts), recorder.config.at(graft.site.path))
                before = len(wrong)
                read = share.method.read(place, found)
                if len(wrong) == before:  # a place that lacks something stays as it is, where that is accepted
                    tensors |= {f"{graft.key}.{name}": value for name, value in read.items()}
        used |= {full for full in every if full.endswith(f".{ALPHA}")}
        wrong += [f"unknown {name}" for name in sorted(set(every) - used)]
        if strict and wrong:
            raise CheckpointError(f"{self.where}: {'; '.join(dict.fromkeys(wrong))}")
        return tensors


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


def _dotted(stem: str, part: str) -> str:
    return stem.removeprefix(f"{part}_").replace("_", ".")
