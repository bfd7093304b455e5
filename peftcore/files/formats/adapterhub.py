"""Reads folders of AdapterHub's library `adapters`: ``adapter_config.json`` and ``adapter.safetensors``.

A name such as ``bert.encoder.layer.0.output.adapters.sst.adapter_up.weight`` has four parts: the path of the module
that the library wraps, the holder (``adapters``), the adapter's name, and the tensor. A `HubArchitecture` translates
one architecture of the library into a method of peftcore. The plugin of the method registers it under
``"adapterhub/ARCHITECTURE"`` in the hook `peftcore_translations`. A union of several architectures is read as the
method `config_union`; its architectures are distinguished by their holders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import CheckpointError, HostMismatch, shown
from peftcore.files.envelope import SavedSite
from peftcore.files.formats.composing import composed, with_overrides
from peftcore.files.formats.description import Description, trouble, unique
from peftcore.files.formats.file_options import Keys
from peftcore.files.formats.file_tensors import Found
from peftcore.files.formats.format import Content, Format
from peftcore.files.formats.rebasing import find_move
from peftcore.files.safe_io import TensorFile, read_json
from peftcore.injection.request import host_map
from peftcore.registry.plugins import imported, layer_of, named_places
from peftcore.targets.resolver import Resolver
from peftcore.targets.sites import Site

CONFIG, TENSORS, HEAD = "adapter_config.json", "adapter.safetensors", "model_head.safetensors"
PLAIN, UNION = "bottleneck", "union"
"""The architecture of files that do not name one, and the architecture that combines several."""


@dataclass(frozen=True)
class HubPlace:
    """One site of the host, with the tensors of the file that belong to it."""

    site: Site
    """The target module."""
    names: Mapping[str, str]
    """Full names of the tensors, keyed by the part of the name that follows the adapter's name."""
    index: int = 0
    """The index of the site among the sites that share these tensors of the file."""
    count: int = 1
    """The number of sites that share these tensors."""


class HubArchitecture(ABC):
    """The translation of one architecture of AdapterHub's files into a method of peftcore."""

    holder: ClassVar[str]
    """The name in front of the adapter's name in the names of tensors: ``"adapters"``."""

    @abstractmethod
    def options(self, keys: Keys, shapes: Mapping[str, Any], resolver: Resolver) -> dict[str, Any]:
        """Returns the options of peftcore's method at one place, including its name under "method". They are translated
        from the options in the file (`keys`), the shapes of the tensors at the place, and the host.

        Raises:
            CheckpointError: peftcore's method cannot compute the same.
        """

    def module(self, place: str) -> str:
        """Returns the path of the host's module for a place, which is the part of a tensor's name before the holder."""
        return place

    def role(self, place: str) -> str | None:
        """Returns the role of the site in the block that contains the place; None if the place is the site's module
        itself."""
        return None

    def places(self, groups: Mapping[str, Mapping[str, str]], keys: Keys, resolver: Resolver) -> list[HubPlace]:
        """Returns the host's sites with the tensors that belong to them. `groups` has the names of the tensors, grouped
        by place. By default each place is one site; architectures whose tensors are stored differently override this
        method.

        Raises:
            HostMismatch: the host lacks the modules.
            CheckpointError: the options install the adapter at places that peftcore's method does not support.
        """
        roles = {place: self.role(place) for place in groups}
        modules = {place: self.module(place) if roles[place] is None else _block(place) for place in groups}
        blocks = {entry.block for entry in resolver.host.entries if entry.block is not None}
        here = blocks if any(roles.values()) else resolver.modules.keys()
        move = find_move(modules.values(), here, f"the adapter of {keys.where}")
        found = []
        for place, role in roles.items():
            path = move(modules[place])
            if role is None:
                found.append(HubPlace(resolver.module_site(path), groups[place]))
                continue
            inside = [site for site in resolver.sites(role) if f"{site.module_path}.".startswith(f"{path}.")]
            if not inside:
                raise HostMismatch(
                    f"the adapter of {keys.where} acts at {place}, but {path} of this model has no {role}"
                )
            found.append(HubPlace(inside[0], groups[place]))
        return found

    @abstractmethod
    def read(self, place: HubPlace, operator: Any, found: Found) -> dict[str, Tensor]:
        """Returns the tensors of one operator, read from the file, keyed by their names in peftcore."""


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
        whole, parts = _read(path)
        name = whole.take("name", str)
        whole.check_known()
        architectures = [_architecture(kind, keys.where) for keys, kind in parts]
        if not (path / TENSORS).exists():
            held = ", ".join(sorted(each.name for each in path.iterdir()))
            raise CheckpointError(
                f"{path} has no {TENSORS}, only {held}: in adapters, save with use_safetensors=True; a .bin is a "
                "pickle, which can run any code when it is read. If you trust it, convert it once: safetensors.torch"
                ".save_file({k: v.clone() for k, v in torch.load(file, weights_only=True).items()}, "
                f'"{TENSORS}"), for prefix tuning too, which adapters saves only as a pickle'
            )
        head = TensorFile(path / HEAD) if (path / HEAD).exists() else None
        described = [(keys, architecture) for (keys, _), architecture in zip(parts, architectures, strict=True)]
        return HubContent(described, name, TensorFile(path / TENSORS), head, model)

    def describe(self, path: Path) -> Description:
        whole, parts = _read(path)
        file, name = TensorFile(path / TENSORS), whole.take("name", str)
        sites: list[str] = []
        problem = trouble(lambda: [_architecture(kind, keys.where) for keys, kind in parts])
        for keys, kind in parts if not problem else ():
            middle = f".{_architecture(kind, keys.where).holder}.{name}."
            sites += unique(full.partition(middle)[0] for full in file.shapes if middle in full)
        return Description(
            self.name,
            (file, TensorFile(path / HEAD)) if (path / HEAD).exists() else (file,),
            kind=" + ".join(kind for _, kind in parts),
            options=whole.data["config"],
            base=whole.take("model_name", str, ""),
            host=whole.take("model_class", str, ""),
            sites=unique(sites),
            trained=TensorFile(path / HEAD).shapes if (path / HEAD).exists() else {},
            problem=problem,
        )


def _read(path: Path) -> tuple[Keys, list[tuple[Keys, str]]]:
    """Returns the options of the whole file, and a list of its architectures: the options and the name of each."""
    whole = Keys(read_json(path / CONFIG), path / CONFIG)
    whole.pass_over("model_class", "model_name", "model_type", "hidden_size", "version", "config_id")
    keys = Keys(whole.take("config", dict), whole.where)
    if keys.take("architecture", str, PLAIN) != UNION:
        return whole, [(keys, _kind(keys))]
    parts = keys.take("configs", list)
    keys.check_known()
    if not parts or not all(isinstance(each, dict) for each in parts):
        raise CheckpointError(f"{whole.where}: 'configs' is {shown(parts)}, expected the options of each part")
    return whole, [(part, _kind(part)) for part in (Keys(each, whole.where) for each in parts)]


def _kind(keys: Keys) -> str:
    """Returns the name of an architecture, followed by its composition mode if this is not "add"."""
    kind, mode = keys.take("architecture", str, PLAIN), keys.take("composition_mode", str, "add")
    return kind if mode == "add" else f"{kind} {mode}"


def _architecture(kind: str, where: Path) -> HubArchitecture:
    """Returns the translation of one architecture.

    Raises:
        CheckpointError: no installed plugin translates the architecture.
    """
    places = named_places("peftcore_translations", "translation")
    if f"adapterhub/{kind}" not in places:
        known = sorted(each.removeprefix("adapterhub/") for each in places if each.startswith("adapterhub/"))
        raise CheckpointError(f"{where}: no installed plugin reads AdapterHub's {kind!r}; they read {known}")
    found: HubArchitecture = imported(places[f"adapterhub/{kind}"])()
    return found


class HubContent(Content):
    """The content of an AdapterHub folder for one host."""

    def __init__(
        self,
        parts: Sequence[tuple[Keys, HubArchitecture]],
        name: str,
        file: TensorFile,
        head: TensorFile | None,
        model: nn.Module,
    ) -> None:
        self.file, self.head, self.wrong = file, head, list[str]()
        groups = self._groups([architecture.holder for _, architecture in parts], name, parts[0][0].where)
        resolver = Resolver(model, host_map(model), layer_of)
        self.parts: list[tuple[HubArchitecture, list[HubPlace]]] = []
        configs = []
        for keys, architecture in parts:
            places = architecture.places(groups[architecture.holder], keys, resolver)
            options = {}
            for each in places:
                shapes = {key: file.shapes[full] for key, full in each.names.items()}
                options[each.site.path] = architecture.options(keys, shapes, resolver)
            keys.check_known()
            configs.append(with_overrides(options))
            self.parts.append((architecture, places))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.train = [path for path in head.shapes if path in parameters] if head else []
        if head:
            self.wrong += [f"unknown {path} in {HEAD}" for path in head.shapes if path not in parameters]
        envelope = composed(
            configs,
            [{"": [SavedSite.of(each.site) for each in places]} for _, places in self.parts],
            dtypes=file.dtypes.values(),
            target=unique(each.site.module_path for _, places in self.parts for each in places),
            train=self.train,
        )
        super().__init__(envelope, file.path)

    def _groups(self, holders: Sequence[str], name: str, where: Path) -> dict[str, dict[str, dict[str, str]]]:
        """Returns the full names of the file's tensors, keyed by holder, then by place, then by the part of the name
        that follows the adapter's name.

        Raises:
            CheckpointError: there are no tensors with a holder's name, or two architectures have the same holder.
        """
        if len(set(holders)) < len(holders):
            raise CheckpointError(f"{where}: parts of this union use the same tensor names, {sorted(holders)}")
        found: dict[str, dict[str, dict[str, str]]] = {holder: {} for holder in holders}
        for full in self.file.shapes:
            for holder, groups in found.items():
                place, middle, tensor = full.partition(f".{holder}.{name}.")
                if middle:
                    groups.setdefault(place, {})[tensor] = full
                    break
            else:
                self.wrong.append(f"unknown {full}")
        if not all(found.values()):
            raise CheckpointError(f"{self.file.path} has no tensors of {name!r}, which {CONFIG} describes")
        return found

    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        wrong, used = list(self.wrong), set[str]()

        def read(name: str) -> Tensor:
            return self.file.read([name])[name]

        several, tensors = len(self.parts) > 1, dict[str, Tensor]()
        for index, (architecture, places) in enumerate(self.parts):
            part = f"{index}/" if several else ""
            chosen = surgeon.selections.get(part, ())
            here = {site.module_path: each for site, each in zip(chosen, places, strict=False)}
            for graft in surgeon.grafts:
                if graft.by_method and graft.part == part and graft.operator.state_dict():
                    place = here[_above(graft.site, here)]
                    found = Found(place.names, self.file.shapes, read, wrong, used)
                    values = architecture.read(place, graft.operator, found)
                    tensors |= {f"{graft.key}.{name}": value for name, value in values.items()}
        for graft in surgeon.grafts:
            path = f"{graft.site.module_path}.{graft.site.tensor}".lstrip(".")
            if not graft.by_method and self.head is not None:
                tensors[f"{graft.key}.value"] = self.head.read([path])[path]
        wrong += [f"unknown {name}" for name in sorted(self.file.shapes.keys() - used)]
        if strict and wrong:
            raise CheckpointError(f"{self.where}: {'; '.join(dict.fromkeys(wrong))}")
        return tensors


def _above(site: Site, paths: Iterable[str]) -> str:
    """Returns the path of the selected module that contains the site of an operator, or is its module."""
    return max((path for path in paths if f"{site.module_path}.".startswith(f"{path}.".lstrip("."))), key=len)


def _block(place: str) -> str:
    """Returns the path of the block that contains a place: the part up to the first number."""
    steps = place.split(".")
    last = next((index for index, step in enumerate(steps) if step.isdecimal()), len(steps) - 1)
    return ".".join(steps[: last + 1])
