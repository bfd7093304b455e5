"""Checks of files that cannot be loaded, because they are damaged, written by a newer version, or for another base.
Loading must raise one error, and the host must not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ConfigError, HostMismatch, NewerFormat, UnknownMethod
from peftcore.files.formats.native import METADATA, TENSORS
from peftcore.files.safe_io import TensorFile, write_tensors
from peftcore.targets.sites import Site
from peftcore.testing.checks_files import ONE, saved
from peftcore.testing.kit import Case, check
from peftcore.testing.tools import differences, raises, trace


def _refused(case: Case, path: Path, kind: Any, what: str, *names: str, host: nn.Module | None = None) -> None:
    """Fail unless loading a file raises an error of class `kind` whose message contains all of `names`, and the host
    does not change."""
    model = case.fresh()[0] if host is None else host
    before = trace(model)
    with raises(case, kind, what, names):
        peftcore.load(model, path)
    case.expect(not (wrong := differences(before, trace(model))), f"{what}: the host was changed: {wrong}")


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the envelope (the metadata) in the file of a saved adapter."""
    envelope = json.loads(TensorFile(path / TENSORS).metadata[METADATA])
    change(envelope)
    write_tensors(path / TENSORS, load_file(path / TENSORS), {METADATA: json.dumps(envelope)})


def _damages(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Damage a dictionary of tensors in up to four ways. Return, by name of the tensor, the word that the error message
    must contain."""
    keys = sorted(tensors)
    tensors["unheard.of"] = torch.zeros(2)
    damaged = {"unheard.of": "unknown"}
    for key, way in zip(keys, ("missing", "shape", "dtype"), strict=False):
        damaged[key] = way
        if way == "missing":
            del tensors[key]
        elif way == "shape" or not tensors[key].is_floating_point():
            tensors[key] = torch.zeros(*tensors[key].shape, 2)
        else:
            tensors[key] = torch.zeros(tensors[key].shape, dtype=torch.int32)
    return damaged


@check(
    "missing, unknown, misshaped tensors and wrong dtypes give one error that lists them all, and nothing loads",
    cause="the operator loads or saves in a way of its own, or `inject` changes the host before the file is checked",
    remedy="leave `state_dict` and its kin alone; values that can be wrong are told by `wrong_values`",
    hosts=ONE,
)
def damaged_tensors_are_listed(case: Case) -> None:
    with saved(case) as (path, injection, _, _):
        tensors = load_file(path / TENSORS)
        damaged = _damages(tensors)
        header = TensorFile(path / TENSORS).metadata
        write_tensors(path / TENSORS, tensors, header)
        _refused(case, path, CheckpointError, "a damaged file", *damaged)
        tensors = {key: value.clone() for key, value in injection.state_dict().items()}
        trained = {f"{place}.{key}" for place, module in injection.modules() for key, _ in module.named_parameters()}
        gone = max(trained & tensors.keys())  # what a fresh adapter has otherwise
        lost = tensors.pop(gone)
        write_tensors(path / TENSORS, {**tensors, "unheard.of": torch.zeros(2)}, header)
        loaded = peftcore.load(case.fresh()[0], path, strict=False)
        for key, value in tensors.items():
            case.expect_equal(loaded.state_dict()[key], value, f"{key} with strict=False")
        case.expect(not torch.equal(loaded.state_dict()[gone], lost), f"{gone} is not in the file and not fresh")


@check(
    "files of a newer format or of newer options are refused, and nothing loads",
    cause="`config_version` is something else than a plain number",
    remedy="count it up by one when options change their meaning, and upgrade old ones in `migrate`",
    hosts=("mlp", "llama"),
)
def newer_files_are_refused(case: Case) -> None:
    for key in ("format", "config_version"):
        with saved(case) as (path, _, _, _):
            _edit(path, lambda envelope, key=key: envelope.update({key: envelope[key] + 1}))  # type: ignore[misc]
            _refused(case, path, NewerFormat, f"a newer {key}", "pip install")


@check(
    "options and fields that are unknown, or whose values break a rule, are refused, and nothing loads",
    cause="the method's Config allows extra fields, or drops them when it reads JSON",
    remedy="leave `model_config` and pydantic's functions alone; an option that is gone belongs to `migrate`",
    hosts=("mlp", "llama"),
)
def unknown_options_in_files_are_refused(case: Case) -> None:
    changes: tuple[Callable[[dict[str, Any]], Any], ...] = (
        lambda envelope: envelope["config"].update(unheard_of=1),
        lambda envelope: envelope["config"].update(overrides=3),
        lambda envelope: envelope.update(unheard_of=1),
    )
    for change, named in zip(changes, ("unheard_of", "overrides", "unheard_of"), strict=True):
        with saved(case) as (path, _, _, _):
            _edit(path, change)
            _refused(case, path, (CheckpointError, ConfigError), "an unknown option", named)


def _inside(site: Site) -> list[str]:
    """Return the names of the host's own parameters inside a site that is a whole module, such as an attention."""
    return [name for name, _ in site.module.named_parameters() if ".peft." not in f".{name}."]


@check(
    "an adapter of another base is refused with HostMismatch, and nothing loads",
    cause="the operator's shapes do not follow the site, or it refuses a size with an error of its own",
    remedy="size tensors by `site.weight_shape`; raise UnsupportedSite for sizes that the idea does not fit",
    hosts=("mlp", "encoder", "llama", "convnet"),
)
def another_base_is_refused(case: Case) -> None:
    with saved(case) as (path, injection, _, _):
        sites = [site for selection in injection.selections.values() for site in selection]
        with_tensor = [each for each in sites if each.layer.read(each.module, each.tensor) is not None]
        site = (with_tensor or sites)[0]
        wider, _ = case.fresh()
        for name in [site.tensor] if with_tensor else _inside(site):
            module, _, leaf = f"{site.module_path}.{name}".lstrip(".").rpartition(".")
            owner = wider.get_submodule(module)
            owner._parameters[leaf] = nn.Parameter(torch.zeros([size + 1 for size in owner.get_parameter(leaf).shape]))
        _refused(case, path, HostMismatch, "a base with other shapes", site.module_path, host=wider)
        other = nn.ModuleDict({"unheard_of": nn.Linear(3, 3)})
        _refused(case, path, HostMismatch, "a base of another kind", host=other)


@check(
    "a file of a method that is not installed names what to install, and imports nothing",
    cause="an alias claims a name that other methods may have",
    remedy="list the names alone under which people know this method",
    hosts=("mlp",),
)
def an_absent_method_is_named(case: Case) -> None:
    with saved(case) as (path, _, _, _):
        absent = {"method": "unheard_of", "plugin": "unheard", "plugin_version": "peftcore-unheard 1.2"}
        _edit(path, lambda envelope: envelope.update(absent))
        _refused(case, path, UnknownMethod, "a method that is not installed", "unheard_of", "peftcore-unheard")
