"""Folders of Hugging Face peft: ``adapter_config.json`` and ``adapter_model.safetensors``.

What is the same for all of peft's methods stands here: names of tensors, targets, patterns, modules that train along.
How one of them keeps its options and tensors is said by a `PeftMethod`, which the plugin of our method brings under
``"peft/TYPE"`` in the hook `peftcore_translations`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.envelope import SavedSite
from peftcore.errors import CheckpointError, ExportError
from peftcore.files import TensorFile, read_json
from peftcore.injection import Injection
from peftcore.interop import peft_writing as writing
from peftcore.interop.composing import composed, literally
from peftcore.interop.formats import Content, Files, Format, Tensors
from peftcore.interop.found import Found
from peftcore.interop.keys import Keys
from peftcore.interop.patterns import matching
from peftcore.interop.peft_layers import is_one_of
from peftcore.interop.peft_names import Group, bare_names, check_targets, sort_names
from peftcore.plugins import imported, named_places
from peftcore.surgery import Graft, Surgeon

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NEUTRAL = (
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "fan_in_fan_out", "runtime_config", "init_weights", "megatron_core",
)  # fmt: skip
"""Options that change nothing of what is computed: origin, start, and what the host's layers say themselves."""


@dataclass(frozen=True)
class Place:
    """One operator of ours, for a `PeftMethod` to read into or write from."""

    graft: Graft
    index: int
    """Its number among the operators."""
    count: int
    config: Any
    """Its options."""

    @property
    def site(self) -> Any:
        """Where it stands."""
        return self.graft.site

    @property
    def operator(self) -> Any:
        """The operator; while reading, on the meta device."""
        return self.graft.operator


class PeftMethod(ABC):
    """How peft's files keep one method."""

    methods: ClassVar[tuple[str, ...]]
    """Our methods that it can hold; the first is the one that is read."""
    below: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors below a module: ``"lora_A.weight"``."""
    root: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors that belong to the adapter as a whole; a name that ends with a dot is a beginning."""
    bias: ClassVar[str] = ""
    """What the option `bias` says where the biases of adapted modules train, in types that have the option."""
    patterns: ClassVar[Mapping[str, str]] = {}
    """Options that hold values by pattern of path, and the option that each of them changes."""
    kinds: ClassVar[tuple[type, ...]] = ()
    """What peft adapts with it: classes of modules, or of our layers; where there is none, it is not checked."""

    @abstractmethod
    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        """Our options with "method", from peft's and from shapes of the tensors at one place, by `below` or `root`."""

    def selections(self, keys: Keys, sites: Sequence[SavedSite]) -> dict[str, tuple[SavedSite, ...]]:
        """Our method's selections, from the places that have tensors; none for a method that finds its place itself."""
        return {"": tuple(sites)} if self.below else {}

    def companions(self, keys: Keys) -> list[tuple[str, dict[str, Any]]]:
        """Other types of peft that the same file holds beside this one, with their options."""
        return []

    def trains(self, keys: Keys, path: str) -> tuple[str, ...]:
        """Parameters below a module that are replaced besides, such as a bias."""
        return ()

    def differs(self, place: Place) -> str:
        """What peft computes otherwise at a place of a kind that it takes, or nothing: where it does, an adapter is
        neither read nor written."""
        return ""

    def check(self, place: Place, error: type[CheckpointError] | type[ExportError], where: str = "") -> None:
        """Refuse a place where peft has not the same.

        Raises:
            CheckpointError, ExportError: whichever is wanted.
        """
        if self.kinds and not is_one_of(place.site, self.kinds):
            known = ", ".join(each.__name__ for each in self.kinds)
            raise error(f"{where}{place.site.path} is none of what peft adapts so: {known}")
        if other := self.differs(place):
            raise error(f"{where}{place.site.path}: peft computes something else with {other}")

    @abstractmethod
    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        """One operator's tensors by our names, from those at its module (or of the whole, for a method without)."""

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        """The tensors of shared state by our names, from those of the whole adapter."""
        return {}

    def replaced(self, place: Place, config: Mapping[str, Any], found: Found) -> Tensor:
        """The value of a parameter that `trains` named; `config` are our options."""
        raise NotImplementedError

    def pattern(self, path: str, paths: Collection[str]) -> str:
        """How a pattern means one of all adapted modules, and no other one of them.

        Raises:
            ExportError: none does.
        """
        return f"^{re.escape(path)}"

    @abstractmethod
    def write_options(self, config: Any) -> dict[str, Any]:
        """Peft's options from ours, for one place.

        Raises:
            ExportError: peft cannot do what they say.
        """

    @abstractmethod
    def write(self, place: Place) -> dict[str, Tensor]:
        """One operator's tensors by peft's names."""

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """Shared state by peft's names."""
        return {}


def peft_methods() -> dict[str, str]:
    """Peft's types that plugins can read, and where that is written."""
    places = named_places("peftcore_translations", "translation")
    return {name.removeprefix("peft/"): place for name, place in places.items() if name.startswith("peft/")}


def peft_method(kind: str, where: Path) -> PeftMethod:
    """How peft's files keep one type.

    Raises:
        CheckpointError: no installed plugin reads it.
    """
    known = peft_methods()
    if kind not in known:
        raise CheckpointError(f"{where}: no installed plugin reads peft's {kind}; they read {', '.join(sorted(known))}")
    method: PeftMethod = imported(known[kind])()
    return method


class Peft(Format):
    """Folders of peft."""

    name = "peft"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        if not (path / CONFIG).is_file():
            return False
        try:
            return "peft_type" in read_json(path / CONFIG)
        except CheckpointError:
            return True

    def open(self, path: Path, model: nn.Module) -> Content:
        keys = Keys(read_json(path / CONFIG), path / CONFIG)
        keys.pass_over(*NEUTRAL)
        method = peft_method(keys.take("peft_type", str), keys.where)
        if not (path / TENSORS).exists():
            held = ", ".join(sorted(each.name for each in path.iterdir()))
            pickled = "; a pickle can run any code, convert it first: see `peftcore.load`" if ".bin" in held else ""
            raise CheckpointError(f"{path} has no {TENSORS}, only {held}{pickled}")
        file = TensorFile(path / TENSORS)
        return PeftContent(keys, file, bare_names(file), method, model)

    def files(self, injection: Injection, weights: bool = False) -> Files:
        return written(injection)


def writer_of(injection: Injection) -> tuple[str, PeftMethod]:
    """Peft's type for an injection, and how it is written.

    Raises:
        ExportError: peft has nothing of the kind.
    """
    for kind, place in peft_methods().items():
        method: PeftMethod = imported(place)()
        if injection.method.name in method.methods:
            return kind, method
    raise ExportError(f"peft has no method that computes what {injection.method.name} does")


def written(injection: Injection) -> Files:
    """The files of a peft folder.

    Raises:
        ExportError: peft cannot hold this injection.
    """
    options, tensors = described(injection, *writer_of(injection))
    return {TENSORS: Tensors(tensors, {"format": "pt"}), CONFIG: writing.text_of(options)}


def described(injection: Injection, kind: str, method: PeftMethod) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Peft's options for an injection, and its tensors by peft's names.

    Raises:
        ExportError: peft cannot hold this injection.
    """
    grafts = [graft for graft in injection.grafts if graft.by_method]
    sites = [graft.site for graft in grafts]
    places = [Place(g, i, len(grafts), injection.config.at(g.site.path)) for i, g in enumerate(grafts)]
    along, tensors = writing.along(injection, method.bias)
    if method.below:
        by_path = {writing.module_key(place.site): method.write_options(place.config) for place in places}
        options = writing.common(by_path, method.patterns, method.pattern) | writing.targets(injection, grafts)
    else:
        options = method.write_options(injection.config)
    options |= along
    for place in places:
        method.check(place, ExportError)
        stem = f"{writing.stem_of(place.site, sites)}." if method.below else ""
        tensors |= {f"{stem}{name}": value.detach() for name, value in method.write(place).items()}
    for name, module in injection.shared.items():
        tensors |= {key: value.detach() for key, value in method.write_shared(name, module).items()}
    return writing.whole(injection, kind, options), tensors


@dataclass
class Part:
    """What one of our methods gets of a file; nearly always all of it."""

    method: PeftMethod
    keys: Keys
    groups: list[Group]
    prefix: str = ""
    config: dict[str, Any] = field(default_factory=dict)


class PeftContent(Content):
    """An adapter of peft for one host.

    Args:
        names: the adapter's tensors: their names in the file, by peft's names for them.
        exact: other values of options at some modules, by the paths that `names` have for them.
    """

    def __init__(
        self,
        keys: Keys,
        file: TensorFile,
        names: Mapping[str, str],
        method: PeftMethod,
        model: nn.Module,
        exact: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.file, self.names, self.model, self.exact = file, names, model, exact or {}
        kinds = [(method, keys)]
        kinds += [(peft_method(name, keys.where), Keys(data, keys.where)) for name, data in method.companions(keys)]
        below = [name for kind, _ in kinds for name in kind.below]
        root = [name for kind, _ in kinds for name in kind.root]
        self.sorted = sort_names(file, names, keys, below, root, model)
        self.parts = [
            Part(kind, of, [g for g in self.sorted.groups if g.names.keys() & set(kind.below)]) for kind, of in kinds
        ]
        if method.below:
            check_targets(keys, self.sorted, self.parts[0].groups, model)
        for index, part in enumerate(self.parts):
            part.prefix = f"{index}/" if len(self.parts) > 1 else ""
            part.config = self._options(part)
        self._beside = {path: (part, g) for part in self.parts for g in part.groups
                        for path in part.method.trains(part.keys, g.path)}  # fmt: skip
        trained = self._trained(keys)
        keys.check_known()
        groups = self.parts[0].groups
        envelope = composed(
            [part.config for part in self.parts],
            [part.method.selections(part.keys, [group.site for group in part.groups]) for part in self.parts],
            dtypes=file.dtypes.values(),
            target=[group.path for group in groups] or None,
            train=(*trained, *self._beside),
            host=keys.take("base_model_name_or_path", str, ""),
        )
        super().__init__(envelope, file.path)

    def _options(self, part: Part) -> dict[str, Any]:
        """Options for most places, and other ones where a pattern says so."""
        method, keys, groups = part.method, part.keys, part.groups
        names = self.sorted.root or (groups[0].names if groups else {})
        plain = method.options(keys, {name: self.file.shapes[full] for name, full in names.items()})
        changes: dict[str, dict[str, Any]] = {
            group.written: dict(self.exact.get(group.written, {})) for group in groups
        }
        for key, changed in method.patterns.items():
            left = set(changes)
            for pattern, value in keys.table(key).items():  # the first that matches counts
                hit = matching(pattern, left, keys.where, endings=True)
                left -= hit
                for path in hit:
                    changes[path][changed] = value
        overrides = {}
        for group in groups:
            shapes = {name: self.file.shapes[full] for name, full in group.names.items()}
            here = method.options(keys.patched(changes[group.written]), shapes)
            other = {name: value for name, value in here.items() if value != plain.get(name)}
            if other:
                overrides[literally(group.path)] = other
        return {**plain, "overrides": overrides} if overrides else plain

    def _trained(self, keys: Keys) -> list[str]:
        """The host's parameters that the file brings and its options announce. Copies of others, as peft writes them of
        tables that it adapts, must be what the host has."""
        announced, biases = keys.names("modules_to_save"), keys.take("bias", str, "none")
        found, owned = [], {group.path for part in self.parts for group in part.groups}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for path, full in self.sorted.replaced.items():
            owner, _, leaf = path.rpartition(".")
            bias = leaf == "bias" and (biases == "all" or (biases.endswith("_only") and owner in owned))
            if bias or any(f".{name}." in f".{path}." for name in announced):
                found.append(path)
            elif self.file.shapes[full] != parameters[path].shape or not torch.equal(
                self.file.read([full])[full].to(parameters[path]), parameters[path]
            ):
                self.sorted.wrong.append(f"{full} is none of the adapter's modules and differs from the host's {path}")
        return found

    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        wrong, used = list(self.sorted.wrong), set(self.sorted.replaced.values())
        cache: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            if name not in cache:
                cache.update(self.file.read([name]))
            return cache[name]

        def found(names: Mapping[str, str]) -> Found:
            return Found(names, self.file.shapes, read, wrong, used)

        tensors: dict[str, Tensor] = {}
        whole = found(self.sorted.root)
        for part in self.parts:
            recorder = surgeon.parts[part.prefix[:-1]] if part.prefix else surgeon
            here = {group.path: found(group.names) for group in part.groups}
            selected = zip(recorder.selections.get("", ()), part.groups, strict=False)
            here |= {site.path: found(group.names) for site, group in selected}
            own = [graft for graft in recorder.grafts if graft.by_method]
            for index, graft in enumerate(own):
                site = graft.site
                place = Place(graft, index, len(own), recorder.config.at(site.path))
                before = len(wrong)
                part.method.check(place, CheckpointError, f"{self.where}: ")
                values = part.method.read(place, here.get(site.path) or here.get(site.module_path) or whole)
                if len(wrong) == before:  # a place that lacks something stays as it is, where that is accepted
                    tensors |= {f"{graft.key}.{name}": value for name, value in values.items()}
            for name, shared in recorder.owned.items():
                values = part.method.read_shared(name, shared.module, whole)
                tensors |= {f"shared:{part.prefix}{name}.{key}": value for key, value in values.items()}
        for graft in surgeon.grafts:
            path = f"{graft.site.module_path}.{graft.site.tensor}".lstrip(".")
            if graft.by_method:
                continue
            if path in self._beside:
                part, group = self._beside[path]
                place = Place(graft, 0, 1, surgeon.config)
                value = part.method.replaced(place, part.config, found(group.names))
            else:
                value = found({path: self.sorted.replaced[path]}).take(path, graft.operator.state_dict()["value"].shape)
            tensors[f"{graft.key}.value"] = value
        wrong += [f"unknown {name}" for name in sorted(set(self.names.values()) - used)]
        if strict and wrong:
            raise CheckpointError(f"{self.where}: {'; '.join(dict.fromkeys(wrong))}")
        return tensors
