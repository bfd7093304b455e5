"""Folders of AdapterHub's `adapters`: ``adapter_config.json`` and ``adapter.safetensors``, for reading.

A name such as ``bert.encoder.layer.0.output.adapters.sst.adapter_up.weight`` has the path where that library wraps a
model, a holder, the adapter's name, and a tensor. How one of its architectures is one of our methods is said by a
`HubArchitecture`, which the plugin of the method brings under ``"adapterhub/ARCHITECTURE"`` in the hook
`peftcore_translations`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from peftcore.errors import CheckpointError, HostMismatch
from peftcore.files.envelope import SavedSite
from peftcore.files.formats.composing import composed, with_overrides
from peftcore.files.formats.description import Description, trouble, unique
from peftcore.files.formats.format import Content, Format
from peftcore.files.formats.found import Found
from peftcore.files.formats.keys import Keys
from peftcore.files.formats.rebasing import find_move
from peftcore.files.safe_io import TensorFile, read_json
from peftcore.injection.applying import host_map
from peftcore.registry.plugins import imported, layer_of, named_places
from peftcore.surgery.surgeon import Surgeon
from peftcore.targets.resolver import Resolver
from peftcore.targets.sites import Site

CONFIG, TENSORS, HEAD = "adapter_config.json", "adapter.safetensors", "model_head.safetensors"
PLAIN = "bottleneck"
"""The architecture of files that name none."""


class HubArchitecture(ABC):
    """The translation of one architecture of AdapterHub's files into one of our methods."""

    holder: ClassVar[str]
    """The step of the path in front of the adapter's name: ``"adapters"``."""

    @abstractmethod
    def options(self, keys: Keys, shapes: Mapping[str, Any], resolver: Resolver) -> dict[str, Any]:
        """Returns our options with "method", from theirs, the shapes of the tensors at one place, and the host.

        Raises:
            CheckpointError: our method cannot compute theirs.
        """

    def role(self, place: str) -> str | None:
        """Returns the role by which our site is found in the block of a place; None where the place is the module."""
        return None

    @abstractmethod
    def read(self, site: Site, operator: Any, found: Found) -> dict[str, Tensor]:
        """Returns one operator's tensors by our names."""


class AdapterHub(Format):
    """The format of AdapterHub's folders."""

    name = "adapterhub"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        if not (path / CONFIG).is_file():
            return False
        try:
            data = read_json(path / CONFIG)
        except CheckpointError:
            return False
        return isinstance(data.get("config"), dict) and "peft_type" not in data

    def open(self, path: Path, model: nn.Module) -> Content:
        whole, keys, kind = _read(path)
        name = whole.take("name", str)
        whole.check_known()
        architecture = _architecture(kind, keys.where)
        if not (path / TENSORS).exists():
            held = ", ".join(sorted(each.name for each in path.iterdir()))
            raise CheckpointError(
                f"{path} has no {TENSORS}, only {held}: in adapters, save with use_safetensors=True; a .bin is a "
                "pickle, which can run any code when it is read"
            )
        head = TensorFile(path / HEAD) if (path / HEAD).exists() else None
        return HubContent(keys, name, TensorFile(path / TENSORS), head, architecture, model)

    def describe(self, path: Path) -> Description:
        whole, keys, kind = _read(path)
        file, name = TensorFile(path / TENSORS), whole.take("name", str)
        sites: tuple[str, ...] = ()
        problem = trouble(lambda: _architecture(kind, keys.where))
        if not problem:
            middle = f".{_architecture(kind, keys.where).holder}.{name}."
            sites = unique(full.partition(middle)[0] for full in file.shapes if middle in full)
        return Description(
            self.name,
            (file, TensorFile(path / HEAD)) if (path / HEAD).exists() else (file,),
            kind=kind,
            options=keys.data,
            base=whole.take("model_name", str, ""),
            host=whole.take("model_class", str, ""),
            sites=sites,
            trained=TensorFile(path / HEAD).shapes if (path / HEAD).exists() else {},
            problem=problem,
        )


def _read(path: Path) -> tuple[Keys, Keys, str]:
    """Returns the options of the whole file, those of the adapter, and its architecture."""
    whole = Keys(read_json(path / CONFIG), path / CONFIG)
    whole.pass_over("model_class", "model_name", "model_type", "hidden_size", "version", "config_id")
    keys = Keys(whole.take("config", dict), whole.where)
    kind = keys.take("architecture", str, PLAIN)
    return whole, keys, " ".join([kind, *[m for m in [keys.take("composition_mode", str, "add")] if m != "add"]])


def _architecture(kind: str, where: Path) -> HubArchitecture:
    """Returns the translation of one architecture.

    Raises:
        CheckpointError: no installed plugin does.
    """
    places = named_places("peftcore_translations", "translation")
    if f"adapterhub/{kind}" not in places:
        known = sorted(each.removeprefix("adapterhub/") for each in places if each.startswith("adapterhub/"))
        raise CheckpointError(f"{where}: no installed plugin reads AdapterHub's {kind!r}; they read {known}")
    found: HubArchitecture = imported(places[f"adapterhub/{kind}"])()
    return found


class HubContent(Content):
    """An adapter of AdapterHub for one host."""

    def __init__(
        self, keys: Keys, name: str, file: TensorFile, head: TensorFile | None, architecture: HubArchitecture,
        model: nn.Module,
    ) -> None:  # fmt: skip
        self.file, self.head, self.architecture = file, head, architecture
        self.wrong: list[str] = []
        middle, grouped = f".{architecture.holder}.{name}.", dict[str, dict[str, str]]()
        for full in file.shapes:
            place, found, tensor = full.partition(middle)
            if found:
                grouped.setdefault(place, {})[tensor] = full
            else:
                self.wrong.append(f"unknown {full}")
        if not grouped:
            raise CheckpointError(f"{file.path} holds no tensors of {name!r}, which {CONFIG} speaks of")
        shapes = {place: {key: file.shapes[full] for key, full in names.items()} for place, names in grouped.items()}
        resolver = Resolver(model, host_map(model), layer_of)
        options = {place: architecture.options(keys, each, resolver) for place, each in shapes.items()}
        keys.check_known()
        sites = self._sites(list(grouped), resolver)
        self.groups = [(sites[place], names) for place, names in grouped.items()]
        config = with_overrides({sites[place].path: each for place, each in options.items()})
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.train = [path for path in head.shapes if path in parameters] if head else []
        if head:
            self.wrong += [f"unknown {path} in {HEAD}" for path in head.shapes if path not in parameters]
        envelope = composed(
            [config],
            [{"": [SavedSite.of(site) for site, _ in self.groups]}],
            dtypes=file.dtypes.values(),
            target=[site.module_path for site, _ in self.groups],
            train=self.train,
        )
        super().__init__(envelope, file.path)

    def _sites(self, places: list[str], resolver: Resolver) -> dict[str, Site]:
        """Returns our sites by their place.

        Raises:
            HostMismatch: the host lacks the modules.
        """
        roles = {place: self.architecture.role(place) for place in places}
        modules = {place: place if roles[place] is None else _block(place) for place in places}
        blocks = {entry.block for entry in resolver.host.entries if entry.block is not None}
        here = blocks if any(roles.values()) else resolver.modules.keys()
        move = find_move(modules.values(), here, f"the adapter in {self.file.path}")
        found: dict[str, Site] = {}
        for place, role in roles.items():
            path = move(modules[place])
            if role is None:
                found[place] = resolver.module_site(path)
                continue
            inside = [site for site in resolver.sites(role) if f"{site.module_path}.".startswith(f"{path}.")]
            if not inside:
                raise HostMismatch(f"the adapter in {self.file.path} stands at {place}, but {path} has no {role} here")
            found[place] = inside[0]
        return found

    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        wrong, used = list(self.wrong), set[str]()

        def read(name: str) -> Tensor:
            return self.file.read([name])[name]

        here = {
            site.path: Found(names, self.file.shapes, read, wrong, used)
            for site, (_, names) in zip(surgeon.selections.get("", ()), self.groups, strict=False)
        }
        tensors: dict[str, Tensor] = {}
        for graft in surgeon.grafts:
            path = f"{graft.site.module_path}.{graft.site.tensor}".lstrip(".")
            if not graft.by_method and self.head is not None:
                tensors[f"{graft.key}.value"] = self.head.read([path])[path]
            elif graft.operator.state_dict():
                values = self.architecture.read(graft.site, graft.operator, here[graft.site.path])
                tensors |= {f"{graft.key}.{name}": value for name, value in values.items()}
        wrong += [f"unknown {name}" for name in sorted(self.file.shapes.keys() - used)]
        if strict and wrong:
            raise CheckpointError(f"{self.where}: {'; '.join(dict.fromkeys(wrong))}")
        return tensors


def _block(place: str) -> str:
    """Returns the path up to its first number: the block that a place is in."""
    steps = place.split(".")
    last = next((index for index, step in enumerate(steps) if step.isdecimal()), len(steps) - 1)
    return ".".join(steps[: last + 1])
