"""The envelope of a saved adapter: a description of its method, options, sites and base, without its tensors."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import nn

from peftcore.contract.config import DTYPES, MethodConfig, described, validate_json
from peftcore.contract.installed_methods import AppliedMethod
from peftcore.contract.method import Method
from peftcore.contract.surgeon_protocol import Wishes
from peftcore.errors import CheckpointError, ConfigError, HostMismatch, NewerFormat, UnknownMethod, shown
from peftcore.injection.injection import Injection
from peftcore.injection.request import Request
from peftcore.layers.layer import plain_class
from peftcore.layers.pieces import whole
from peftcore.registry.catalogue import method as find_method
from peftcore.registry.catalogue import methods
from peftcore.surgery.surgeon import RecordingSurgeon
from peftcore.targets.sites import Site

logger = logging.getLogger("peftcore")

FORMAT = 1
WEIGHTS = (".safetensors", ".bin", ".gguf")
"""The suffixes of files with weights in a repository."""


class SavedSite(BaseModel):
    """One site of a selection in a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    module_path: str
    """Path of the module in the model."""
    tensor: str = "weight"
    """Name of the tensor in the module."""
    role: str | None = None
    """If the site is only a part of the tensor: the role of this part, such as ``"attn.q"``. None for the whole
    tensor."""
    rows: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] | None = None
    """If the site is only a part of the tensor: the ranges of its rows as (first, last + 1). None for the whole
    tensor."""
    shape: tuple[NonNegativeInt, ...] | None = None
    """Logical shape; empty for a module without its own weight, None if the file does not contain it."""

    @classmethod
    def of(cls, site: Site) -> SavedSite:
        """Returns the record of a selected site."""
        return cls(
            module_path=site.module_path, tensor=site.tensor, role=site.role, rows=site.slices, shape=site_shape(site)
        )

    @property
    def record(self) -> dict[str, Any]:
        """The arguments that find the site in a model again."""
        return {**self.model_dump(include={"module_path", "tensor", "role"}), "slices": self.rows}


class Envelope(BaseModel):
    """The content of ``adapter.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    """Version of the file format."""
    method: str
    """Name of the method."""
    plugin: str = ""
    """Name of the plugin that has the method."""
    plugin_version: str = ""
    """Version of that plugin."""
    config_version: NonNegativeInt
    """Version of the method's options."""
    part_versions: dict[str, NonNegativeInt] = {}
    """The version of the options of each part of a hybrid, keyed by the part's name: ``"0"``, ``"0/1"``."""
    config: dict[str, Any]
    """Options of the method."""
    target: Any = None
    """The argument `target` of `apply`."""
    exclude: Any = None
    """The argument `exclude` of `apply`."""
    train: tuple[str, ...] = ()
    """Paths of modules and parameters of the host that were trained with the adapter."""
    classes: tuple[str, ...] = ()
    """Class names of the host's classification head, in the order of their ids; empty if nothing of the host was
    trained, or if the host's config has no class names."""
    untied: tuple[str, ...] = ()
    """Paths of trained modules whose parameters have separate values in the file, even if other modules of the host
    hold the same tensors (`Wishes.untied`)."""
    ties: dict[str, tuple[str, ...]] | None = None
    """Maps the name of an operator in files to the paths of other parameters that were tied to the tensor of its site.
    The operator acts on them too. None in files that do not record ties."""
    rows: dict[str, tuple[NonNegativeInt, NonNegativeInt]] = {}
    """Maps the path of a token table to a range of its rows (first, last + 1). The original base lacks these rows, so
    the file contains them although they were not trained."""
    dtype: str = "float32"
    """Dtype of the operators' parameters."""
    host: str = ""
    """Class of the host, for information only."""
    base: str | None = None
    """The name of the weights in the host's own config: a folder, or a repository on a hub."""
    base_revision: str | None = None
    """The commit of the base's repository from which the host was loaded."""
    weights: str | None = None
    """Digest of the host's tensors at the sites; None unless the user asked for it."""
    selections: dict[str, tuple[SavedSite, ...]]
    """The sites of each selection of the method, keyed by the selection's name."""

    @property
    def wishes(self) -> Wishes:
        """The arguments for applying the method to a model again. They contain the sites in the file, so that no
        targets are searched for.

        Raises:
            CheckpointError: operators cannot have the dtype.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(f"operators cannot have dtype {self.dtype!r}; possible are {', '.join(DTYPES)}")
        saved = {key: [site.record for site in sites] for key, sites in self.selections.items()}
        return Wishes(
            self.target, self.exclude, self.train, 0, DTYPES[self.dtype], saved, self.rows, untied=self.untied
        )

    def request(self, model: nn.Module) -> Request:
        """Returns the request that applies the adapter to `model` again.

        Raises:
            UnknownMethod: no installed plugin has its method.
            NewerFormat: its options are newer than the installed plugin.
            CheckpointError: its options are wrong, or operators cannot have the dtype.
            HostMismatch: it names many more sites than the model has.
        """
        cls = method_of(self)
        request = Request(model, cls(), options_of(cls, self), self.wishes)
        told, here = sum(map(len, self.selections.values())), sum(1 for _ in model.modules())
        if told > 100 * here:
            raise HostMismatch(
                f"the adapter belongs to another base: it has {told:,} sites, and this model has {here:,} modules"
            )
        return request

    def check(self, surgeon: RecordingSurgeon) -> None:
        """Check that a model matches the one on which the adapter was made. `surgeon` has the operators that a dry run
        recorded for the model. Different class names of a classification head are only logged.

        Raises:
            HostMismatch: shapes or ties differ, or the weights differ from a digest in the file.
        """
        made = f"the adapter belongs to another base (it was made on {self.host})"
        if wrong := mismatched(self, surgeon.selections):
            raise HostMismatch(f"{made}: {'; '.join(wrong[:8])}")
        if tied := otherwise_tied(self, surgeon):
            raise HostMismatch(
                f"{made}: {'; '.join(tied[:8])}. Use a model with the same ties (tie_word_embeddings in a config of "
                "transformers)"
            )
        if self.weights is not None and self.weights != weights_digest(graft.site for graft in surgeon.grafts):
            raise HostMismatch(f"{made}: the base has other weights at its sites")
        names = class_names(surgeon.model)
        if self.classes and names and names != self.classes:
            logger.warning(
                "the adapter was trained with a head for the classes %s, in this order; the config of the model names "
                "%s",
                shown(list(self.classes)),
                shown(list(names)),
            )

    @property
    def text(self) -> str:
        """The envelope as indented JSON, the same for equal adapters."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @property
    def short(self) -> str:
        """The envelope as JSON without default values and spaces, for a file's header."""
        return self.model_dump_json(exclude_defaults=True)


def site_shape(site: Site) -> tuple[int, ...]:
    """Returns the logical shape of a selected site; empty for a module without its own weight."""
    return tuple(site.weight_shape) if site.layer.has(site.module, site.tensor) else ()


def spelled(target: Any) -> Any:
    """Returns a target as JSON values: strings stay as the user wrote them; types and predicates become their names,
    for information only."""
    if target is None or isinstance(target, str):
        return target
    if isinstance(target, type) or callable(target):
        return f"<{target.__module__}.{target.__qualname__}>"
    return [spelled(each) for each in target]


def envelope_of(injection: Injection, weights: bool = False, rows: Mapping[str, tuple[int, int]] = {}) -> Envelope:
    """Returns the envelope of `injection`; with `weights`, also a digest of its base's values at the sites. `rows` are
    the rows that the original base lacks, keyed by the path of the token table."""
    name = injection.method.name
    info = next(
        (i for i in methods() if i.name == name and find_method(f"{i.plugin}/{i.name}") is type(injection.method)), None
    )
    wishes, model, cls = injection.wishes, injection.model, plain_class(injection.model)
    return Envelope(
        format=FORMAT,
        method=name,
        plugin=info.plugin if info else "registered",
        plugin_version=info.distribution if info else "",
        config_version=injection.method.config_version,
        part_versions=dict(_part_versions(injection)),
        config=injection.config.model_dump(mode="json"),
        target=spelled(wishes.target),
        exclude=spelled(wishes.exclude),
        train=injection.trained_along,
        classes=class_names(model) if injection.trained_along else (),
        untied=wishes.untied,
        ties=dict(injection.ties),
        rows=dict(rows),
        dtype=str(wishes.dtype).removeprefix("torch."),
        host=f"{cls.__module__}.{cls.__qualname__}",
        base=base_name(model),
        base_revision=base_revision(model),
        weights=weights_digest(injection.sites) if weights else None,
        selections={key: tuple(map(SavedSite.of, sites)) for key, sites in injection.selections.items()},
    )


def base_name(model: nn.Module) -> str | None:
    """Returns the name of the weights in the host's own config (models of transformers and diffusers have one)."""
    config = vars(model).get("config") or vars(model).get("_internal_dict")
    name = getattr(config, "_name_or_path", None) or (config.get("_name_or_path") if isinstance(config, dict) else None)
    return str(name) if name else None


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the class names of a classifier of transformers from its config, in the order of their ids; empty if it
    has none, or only the default names (``LABEL_0``)."""
    names = getattr(vars(model).get("config"), "id2label", None)
    if not isinstance(names, dict) or all(str(name) == f"LABEL_{number}" for number, name in names.items()):
        return ()
    return tuple(str(names[number]) for number in sorted(names, key=int))


def base_revision(model: nn.Module) -> str | None:
    """Returns the commit of the hub repository from which the host was loaded, if it is certain: the config contains it
    (`load_base` and old versions of transformers write it), or the hub's cache has only one commit."""
    config: Any = vars(model).get("config")
    if commit := getattr(config, "_commit_hash", None):
        return str(commit)
    hub, name = sys.modules.get("huggingface_hub"), base_name(model)
    if hub is None or name is None or Path(name).exists():
        return None
    snapshots = Path(hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    held = [each.parent for each in snapshots.glob("*/config.json")]
    held = [each for each in held if any(file.suffix in WEIGHTS for file in each.iterdir())]
    return held[0].name if len(held) == 1 else None


def weights_digest(sites: Iterable[Site]) -> str:
    """Returns the SHA-256 of the stored tensors at sites, in the order of their paths."""
    digest = hashlib.sha256()
    for site in sorted(sites, key=lambda each: each.path):
        value = site.layer.read(site.module, site.tensor)
        if value is not None:
            value = whole(value)
            digest.update(f"{site.path} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def parse_envelope(data: Mapping[str, Any], where: object) -> Envelope:
    """Returns the envelope in a JSON object.

    Raises:
        NewerFormat: it was written by a newer peftcore.
        CheckpointError: the object is not a valid envelope.
    """
    version = data.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormat(f"{where} has format {version}, this peftcore reads up to {FORMAT}: pip install -U peftcore")
    try:
        found = Envelope.model_validate_json(json.dumps(data))
    except ValidationError as error:
        places = [(".".join(map(str, each["loc"])), each) for each in described(error)]
        wrong = "; ".join(f"{place}={shown(each['input'])}: {each['msg']}" for place, each in places)
        raise CheckpointError(f"{where} cannot be read: {wrong}") from None
    if len(set(found.train)) < len(found.train):
        raise CheckpointError(f"{where} cannot be read: its field 'train' names a tensor twice")
    return found


def method_of(envelope: Envelope) -> type[Method]:
    """Returns the installed method that an envelope names.

    Raises:
        UnknownMethod: no installed plugin has the method; the message says what to install.
    """
    known = {info.plugin for info in methods() if info.name == envelope.method}
    try:
        return find_method(f"{envelope.plugin}/{envelope.method}" if envelope.plugin in known else envelope.method)
    except UnknownMethod as error:
        written = f"; the adapter was written with {envelope.plugin_version}" if envelope.plugin_version else ""
        raise UnknownMethod(f"{error}{written}") from None


def _part_versions(injection: AppliedMethod, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields the name of each part of a hybrid, and the version of its options."""
    for name, part in injection.parts.items():
        yield prefix + name, part.method.config_version
        yield from _part_versions(part, f"{prefix}{name}/")


def _migrated(
    cls: type[Method],
    options: dict[str, Any],
    version: int,
    parts: Mapping[str, int],
    plugin: str = "its plugin",
    prefix: str = "",
) -> dict[str, Any]:
    """Returns options of an old `version`, migrated to the version of the installed method. The options under "parts"
    of a hybrid are migrated too. A part without a version has version 1."""
    if version > cls.config_version:
        raise NewerFormat(
            f"the adapter has version {version} of {cls.name}'s options, the installed plugin reads up "
            f"to {cls.config_version}: pip install -U {plugin}"
        )
    for each in range(version, cls.config_version):
        options = cls.migrate(dict(options), each)
    if not isinstance(listed := options.get("parts"), list):
        return options
    return {**options, "parts": [_part(each, f"{prefix}{number}", parts) for number, each in enumerate(listed)]}


def _part(options: Any, name: str, parts: Mapping[str, int]) -> Any:
    if not isinstance(options, dict) or not isinstance(options.get("method"), str):
        return options  # which the hybrid refuses
    return _migrated(find_method(options["method"]), options, parts.get(name, 1), parts, prefix=f"{name}/")


def options_of(cls: type[Method], envelope: Envelope) -> MethodConfig:
    """Returns the options of an envelope, migrated to the version of the installed plugin.

    Raises:
        NewerFormat: they are newer than the installed plugin.
        CheckpointError: they are wrong.
    """
    plugin = envelope.plugin_version.split(" ")[0] or "its plugin"
    options = _migrated(cls, envelope.config, envelope.config_version, envelope.part_versions, plugin)
    try:
        return validate_json(cls.Config, json.dumps(options))
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"the adapter's options are wrong: {error}") from None


def otherwise_tied(envelope: Envelope, surgeon: RecordingSurgeon) -> list[str]:
    """Returns the parameters that are tied to the tensor of an operator's site in only one of two models: the one on
    which the adapter was made, or this one. Modules that this host lacks are ignored."""
    wrong: list[str] = []
    if envelope.ties is None:
        return wrong
    for graft in surgeon.grafts:
        told, here = set(envelope.ties.get(graft.key, ())), set(surgeon.ties.get(graft.key, ()))
        told = {path for path in told if surgeon.resolver.has_parameter(path)}
        own = f"{graft.site.module_path}.{graft.site.tensor}".lstrip(".")
        wrong += [f"{own} was tied to {path}, and is not tied to it here" for path in sorted(told - here)]
        wrong += [f"{own} was not tied to {path}, and is tied to it here" for path in sorted(here - told)]
    return wrong


def mismatched(envelope: Envelope, selections: Mapping[str, Sequence[Site]]) -> list[str]:
    """Returns the sites whose shapes on this host differ from the file's."""
    wrong = []
    for key, saved in envelope.selections.items():
        for record, site in zip(saved, selections.get(key, ()), strict=False):
            here = site_shape(site)
            if record.shape is not None and here != record.shape:
                wrong.append(f"{site.path} is {here} here and was {record.shape}")
    return wrong
