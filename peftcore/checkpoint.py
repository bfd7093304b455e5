"""An adapter on disk: ``adapter.json`` (the envelope) beside ``adapter.safetensors``. No pickle; nothing named by a
file is imported.

Everything is checked against the host before the host changes: on any error nothing is loaded, and one error lists all
that is wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from peftcore.applying import check_name, establish, prepare
from peftcore.catalogue import method as find_method
from peftcore.catalogue import methods
from peftcore.config import validate_json
from peftcore.contract import Method
from peftcore.errors import (
    CheckpointError,
    ConfigError,
    HostMismatch,
    NewerFormat,
    PluginError,
    TargetError,
    UnknownMethod,
    UnsupportedSite,
)
from peftcore.injection import Injection
from peftcore.planning import Plan
from peftcore.surgery import Wishes
from peftcore.targets import Site

FORMAT = 1
ENVELOPE, TENSORS = "adapter.json", "adapter.safetensors"


class SavedSite(BaseModel):
    """One site as a selection found it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    module_path: str
    tensor: str
    role: str | None
    rows: tuple[tuple[int, int], ...] | None
    shape: tuple[int, ...]


class Envelope(BaseModel):
    """What ``adapter.json`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    method: str
    plugin: str
    plugin_version: str
    config_version: int
    config: dict[str, Any]
    target: Any
    exclude: Any
    train: tuple[str, ...]
    dtype: str
    host: str
    """Class of the host, for people to read."""
    selections: dict[str, tuple[SavedSite, ...]]


def _spelled(target: Any) -> Any:
    """A target as JSON keeps it: strings as the user wrote them, types and predicates by their name (they are for
    reading only)."""
    if target is None or isinstance(target, str):
        return target
    if isinstance(target, type) or callable(target):
        return f"<{target.__module__}.{target.__qualname__}>"
    return [_spelled(each) for each in target]


def _envelope(injection: Injection) -> Envelope:
    name = injection.method.name
    info = next(
        (i for i in methods() if i.name == name and find_method(f"{i.plugin}/{i.name}") is type(injection.method)), None
    )
    selections = {
        key: tuple(
            SavedSite(
                module_path=site.module_path,
                tensor=site.tensor,
                role=site.role,
                rows=site.rows,
                shape=_shape(site),
            )
            for site in sites
        )
        for key, sites in injection.selections.items()
    }
    wishes = injection.wishes
    return Envelope(
        format=FORMAT,
        method=name,
        plugin=info.plugin if info else "registered",
        plugin_version=info.distribution if info else "",
        config_version=injection.method.config_version,
        config=injection.config.model_dump(mode="json"),
        target=_spelled(wishes.target),
        exclude=_spelled(wishes.exclude),
        train=wishes.train,
        dtype=str(wishes.dtype).removeprefix("torch."),
        host=f"{type(injection.model).__module__}.{type(injection.model).__qualname__}",
        selections=selections,
    )


def save(injection: Injection, path: Path) -> None:
    """Write the folder; each file appears whole or not at all, and equal adapters give equal bytes."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in injection.state_dict().items()}
    storages = [value.untyped_storage().data_ptr() for value in injection.state_dict().values() if value.numel()]
    if len(set(storages)) != len(storages):
        raise PluginError(
            f"{injection.method.name} registers a tensor twice: keep what surgeon.own returns, do not make it a child"
        )
    text = json.dumps(_envelope(injection).model_dump(mode="json"), indent=2) + "\n"
    path.mkdir(parents=True, exist_ok=True)
    partial = path / f".{TENSORS}.{os.getpid()}"
    try:
        save_file(dict(sorted(tensors.items())), partial, metadata={"format": "pt"})
        os.replace(partial, path / TENSORS)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path / ENVELOPE)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> tuple[Envelope, dict[str, torch.Tensor]]:
    missing = [name for name in (ENVELOPE, TENSORS) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} is no saved adapter: {' and '.join(missing)} missing")
    try:
        text = (path / ENVELOPE).read_text(encoding="utf-8")
        version = json.loads(text).get("format")
        if isinstance(version, int) and version > FORMAT:
            raise NewerFormat(
                f"{path} has format {version}, this peftcore reads up to {FORMAT}: pip install -U peftcore"
            )
        envelope = Envelope.model_validate_json(text)
        with safe_open(path / TENSORS, framework="pt") as file:
            return envelope, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except NewerFormat:
        raise
    except (SafetensorError, ValidationError, ValueError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _options(cls: type[Method], envelope: Envelope) -> Any:
    if envelope.config_version > cls.config_version:
        raise NewerFormat(
            f"the adapter has version {envelope.config_version} of {cls.name}'s options, the installed plugin knows "
            f"{cls.config_version}: "
            f"pip install -U {envelope.plugin_version.split(' ')[0] or 'its plugin'}"
        )
    options = envelope.config
    for version in range(envelope.config_version, cls.config_version):
        options = cls.migrate(dict(options), version)
    try:
        return validate_json(cls.Config, json.dumps(options))
    except ConfigError as error:
        raise CheckpointError(f"the adapter's options are wrong: {error}") from None


def _check_host(envelope: Envelope, selections: Mapping[str, Sequence[Site]]) -> None:
    wrong = []
    for key, saved in envelope.selections.items():
        for record, site in zip(saved, selections.get(key, ()), strict=False):
            here = _shape(site)
            if here != record.shape:
                wrong.append(f"{site.path} is {here} here and was {record.shape}")
    if wrong:
        raise HostMismatch(
            f"the adapter belongs to another base (it was made on {envelope.host}): {'; '.join(wrong[:8])}"
        )


def _shape(site: Site) -> tuple[int, ...]:
    """The logical shape of a selected site; empty for a module without a weight of its own."""
    return tuple(site.weight_shape) if site.layer.has(site.module, site.tensor) else ()


def _check_tensors(plan: Plan, tensors: dict[str, torch.Tensor], strict: bool) -> None:
    wrong = []
    if strict:
        wrong += [f"missing {key}" for key in sorted(plan.shapes.keys() - tensors.keys())]
        wrong += [f"unknown {key}" for key in sorted(tensors.keys() - plan.shapes.keys())]
    for key in sorted(plan.shapes.keys() & tensors.keys()):
        if plan.shapes[key] != tensors[key].shape:
            wrong.append(f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(plan.shapes[key])}")
        if not tensors[key].is_floating_point() and plan.floating[key]:
            wrong.append(f"{key} has dtype {tensors[key].dtype}, expected a floating-point one")
    if wrong:
        raise CheckpointError("; ".join(wrong))


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    trainable: bool = False,
    strict: bool = True,
) -> Injection:
    """Apply a saved adapter to a host of the same shape.

    Args:
        model: the host.
        path: the folder that `Injection.save` wrote.
        name: name of the injection on this host; the method's by default.
        trainable: False loads it frozen.
        strict: False accepts missing tensors (they keep their fresh values) and unknown ones (they are passed over).

    Raises: CheckpointError, HostMismatch, NewerFormat, UnknownMethod: listing everything that is wrong; the host was
        not changed.
    """
    envelope, tensors = _read(Path(path))
    cls = _method_of(envelope)
    config = _options(cls, envelope)
    name = check_name(model, name or cls.name)
    records = {
        key: [saved.model_dump(include={"module_path", "tensor", "role", "rows"}) for saved in selection]
        for key, selection in envelope.selections.items()
    }
    wishes = Wishes(
        envelope.target, envelope.exclude, envelope.train, 0, getattr(torch, envelope.dtype, torch.float32), records
    )
    try:
        rehearsal = prepare(model, cls(), config, wishes, None, dry=True)
    except (KeyError, TargetError) as error:
        raise HostMismatch(
            f"the adapter belongs to another base (it was made on {envelope.host}): no {error} here"
        ) from None
    except UnsupportedSite as error:
        raise HostMismatch(f"the adapter does not fit this base (it was made on {envelope.host}): {error}") from None
    _check_host(envelope, rehearsal.selections)
    _check_tensors(Plan.of(rehearsal), tensors, strict)
    injection = establish(prepare(model, cls(), config, wishes, None, dry=False), name)
    _fill(injection, tensors)
    injection.trainable(trainable)
    return injection


def _method_of(envelope: Envelope) -> type[Method]:
    known = {info.plugin for info in methods() if info.name == envelope.method}
    try:
        return find_method(f"{envelope.plugin}/{envelope.method}" if envelope.plugin in known else envelope.method)
    except UnknownMethod as error:
        raise UnknownMethod(f"{error}; the adapter was written with {envelope.plugin_version}") from None


@torch.no_grad()
def _fill(injection: Injection, tensors: dict[str, torch.Tensor]) -> None:
    for path, module in injection.modules():
        for key, value in module.state_dict(keep_vars=True).items():
            saved = tensors.get(f"{path}.{key}")
            if saved is not None:
                value.data.copy_(saved)
