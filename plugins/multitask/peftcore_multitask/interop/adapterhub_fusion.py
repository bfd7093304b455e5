"""AdapterFusion in AdapterHub's folders (checked against adapters 1.3.0): ``adapter_fusion_config.json`` and
``model_adapter_fusion.safetensors``.

The folder contains only the fusion. First load the adapters that it fuses, each from its own folder and under the name
that the fusion uses for it. Then load the fusion, and call ``peftcore.activate(model, Fuse("a", "b", by="fusion"))``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import HostMap, Injection, injections
from peftcore.author import Site, Surgeon
from peftcore.author.formats import (
    Content,
    Description,
    Files,
    Format,
    Found,
    Keys,
    SavedSite,
    TensorFile,
    Tensors,
    composed,
    find_move,
    host_map,
    read_json,
    unique,
)
from peftcore.errors import CheckpointError, ExportError, HostMismatch, PeftcoreError
from peftcore_additive.houlsby_adapter import SerialOperator
from peftcore_additive.pfeiffer_adapter import PfeifferOperator

CONFIG, TENSORS = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
HOLDER = "adapter_fusion_layer"
NEVER = 1e-300
"""A dropout probability that is too small to drop anything. For 0, the adapters library would use the dropout of the
host's attention."""
Place = tuple[str, bool]
"""The path of a block, and whether the adapters act at its attention (else at its feed-forward)."""


class AdapterHubFusion(Format):
    """The format of AdapterHub's folders of one fusion."""

    name = "adapterhub_fusion"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return (path / CONFIG).is_file()

    def open(self, path: Path, model: nn.Module) -> Content:
        whole, keys = _read(path)
        name, adapters = whole.take("name", str), whole.names("adapter_names")
        whole.check_known()
        options = _options(keys, adapters, model)
        if not (path / TENSORS).exists():
            raise CheckpointError(f"{path} has no {TENSORS}: save it in adapters with use_safetensors=True")
        return FusionContent(TensorFile(path / TENSORS), name, options, model)

    def describe(self, path: Path) -> Description:
        whole, keys = _read(path)
        file, middle = TensorFile(path / TENSORS), f".{HOLDER}.{whole.take('name', str)}."
        return Description(
            self.name,
            (file,),
            methods=("adapter_fusion",),
            kind="fusion",
            options={"adapter_names": whole.names("adapter_names"), **keys.data},
            base=whole.take("model_name", str, ""),
            host=whole.take("model_class", str, ""),
            sites=unique(full.partition(middle)[0] for full in file.shapes if middle in full),
        )

    def files(self, injection: Injection, weights: bool = False) -> Files:
        model, options, host = injection.model, injection.config, host_map(injection.model)
        adapters = _exported(injection)
        name = ",".join(adapters)
        sites = _fused(model, host, adapters, "the fusion", ExportError)
        fusions = {graft.site.module_path: graft for graft in injection.grafts}
        if [*fusions] != [site.module_path for site in sites.values()]:
            raise ExportError(
                f"{injection.name!r} fuses at {len(fusions)} of the {len(sites)} modules of its adapters, but adapters "
                "fuses at all of them: apply it without target and exclude"
            )
        tensors: dict[str, Tensor] = {}
        for site in sites.values():
            operator: Any = fusions[site.module_path].operator
            _check_mixes(operator, site, model, adapters)
            prefix = f"{_holder(host, site)}.{HOLDER}.{name}"
            own = {"query.weight": operator.query, "query.bias": operator.bias, "key.weight": operator.key}
            own["key.bias"] = torch.zeros_like(operator.bias)  # which changes nothing, see below
            if operator.value is not None:
                own["value.weight"] = operator.value
            tensors |= {f"{prefix}.{key}": value.detach() for key, value in own.items()}
        config = vars(model).get("config")
        written = {
            "name": name,
            "adapter_names": adapters,
            "config": {
                **dict.fromkeys(("query", "key", "value_before_softmax"), True),
                **dict.fromkeys(("query_before_ln", "residual_before", "temperature"), False),
                **dict.fromkeys(("value", "value_initialized", "regularization"), options.value),
                "dropout_prob": options.dropout or NEVER,
            },
            "model_type": getattr(config, "model_type", None),
            "model_class": type(model).__name__,
            "model_name": getattr(config, "_name_or_path", ""),
            "hidden_size": getattr(config, "hidden_size", None),
        }
        return {TENSORS: Tensors(tensors, {"format": "pt"}), CONFIG: json.dumps(written, indent=2, sort_keys=True)}


def _read(path: Path) -> tuple[Keys, Keys]:
    whole = Keys(read_json(path / CONFIG), path / CONFIG)
    whole.pass_over("model_class", "model_name", "model_type", "hidden_size", "version")
    return whole, Keys(whole.take("config", dict), whole.where)


def _options(keys: Keys, adapters: list[str], model: nn.Module) -> dict[str, Any]:
    """Returns the options for peftcore's fusion. The penalty of V, and whether V acts before or after the sum, are
    skipped, since they make no difference.

    Raises:
        CheckpointError: peftcore's fusion cannot compute the same.
    """
    keys.pass_over("regularization", "value_initialized", "value_before_softmax")
    for key in ("key", "query"):
        if not keys.take(key, bool):
            raise CheckpointError(f"{keys.where}: {key!r} is False, but peftcore's fusion always has this matrix")
    for key in ("query_before_ln", "residual_before", "temperature"):
        if keys.take(key, bool, False):
            raise CheckpointError(f"{keys.where}: {key!r} is True, and peftcore's fusion has no such option")
    host = getattr(vars(model).get("config"), "attention_probs_dropout_prob", 0.0)
    dropout = keys.take("dropout_prob", float, 0.0) or host
    value = keys.take("value", bool)
    keys.check_known()
    dropout = 0.0 if dropout <= NEVER else float(dropout)
    return {"method": "adapter_fusion", "adapters": adapters, "value": value, "dropout": dropout}


def _exported(injection: Injection) -> list[str]:
    """Returns the names of the adapters that a fusion fuses.

    Raises:
        ExportError: the adapters library cannot represent the fusion.
    """
    if injection.method.name != "adapter_fusion" or not injection.config.adapters:
        raise ExportError(
            f"{injection.name!r} ({injection.method.name}) is not a fusion of the model's adapters, and "
            "adapterhub_fusion files hold nothing else: use peftcore.apply(model, 'adapter_fusion', adapters=[...])"
        )
    if any(not graft.by_method for graft in injection.grafts):
        raise ExportError(
            f"{injection.name!r} also trains modules of the model, which these files cannot hold; save it in "
            "peftcore's own format"
        )
    adapters: list[str] = injection.config.adapters
    if wrong := [name for name in adapters if "." in name or "," in name]:
        raise ExportError(f"{wrong[0]!r} cannot be an adapter's name in adapters: rename it without dots and commas")
    return adapters


def _fused(
    model: nn.Module, host: HostMap, adapters: Sequence[str], what: str, error: type[PeftcoreError]
) -> dict[Place, Site]:
    """Returns the modules at which adapters of the model are fused, by place.

    Raises:
        PeftcoreError: an adapter is not a Pfeiffer or Houlsby adapter of a block's attention or feed-forward, or
            adapters have different positions there. The class of the error is `error`.
    """
    entries = {entry.module: entry for entry in host.entries}
    sites: dict[Place, Site] = {}
    kinds: dict[Place, str] = {}
    for adapter in adapters:
        for graft in injections(model)[adapter].grafts:
            if not graft.by_method:
                continue
            site, operator = graft.site, graft.operator
            kind = "branch" if isinstance(operator, SerialOperator) and not operator.changes_inputs else ""
            kind = operator.placement if isinstance(operator, PfeifferOperator) else kind
            entry = entries.get(site.module_path)
            if not kind or entry is None or entry.block is None or entry.role.startswith("cross"):
                raise error(
                    f"{what}: {adapter} acts at {site.path} and is not a Pfeiffer or Houlsby adapter, the only ones "
                    "that adapters fuses as peftcore does"
                )
            place = (entry.block, entry.role.startswith("attn"))
            sites[place] = site
            if kinds.setdefault(place, kind) != kind:
                raise error(
                    f"{what}: {adapter} has another position at {site.path} than the other adapters (before a norm, "
                    "after it, in the branch), but adapters uses the last adapter's position for all"
                )
    return sites


def _check_mixes(operator: Any, site: Site, model: nn.Module, adapters: Sequence[str]) -> None:
    """Check that a fusion mixes the same values as in the adapters library.

    Raises:
        ExportError: the fusion mixes outputs of a norm, where that library mixes inputs.
    """
    grafts = [graft for graft in injections(model)[adapters[0]].grafts if graft.site.path == site.path]
    if not operator.mixes_inputs and all(graft.operator.only_inputs for graft in grafts):
        raise ExportError(
            f'{site.path}: adapters mixes what its adapters pass to a norm; apply the fusion with mixes="inputs"'
        )


def _holder(host: HostMap, site: Site) -> str:
    """Returns the path of the module that contains a site's fusion in the adapters library. This module must contain
    the site's matrix and the norm after it, and nothing else.

    Raises:
        ExportError: the block is built in another way; then that library stores fusions in another module.
    """
    around = site.module_path.rpartition(".")[0]
    inside = [entry for entry in host.entries if entry.path.rpartition(".")[0] == around and entry.kind != "container"]
    if sorted("norm" if entry.role == "norm" else entry.path for entry in inside) != sorted(("norm", site.module_path)):
        raise ExportError(
            f"{site.path}: fusions can be saved for blocks in which one module has a matrix and the norm after it, as "
            "in BERT and RoBERTa; for other blocks use peftcore's own format"
        )
    return around


class FusionContent(Content):
    """The content of a fusion folder of AdapterHub, for a host that already has the fused adapters."""

    def __init__(self, file: TensorFile, name: str, options: dict[str, Any], model: nn.Module) -> None:
        self.file, self.wrong, places = file, list[str](), dict[Place, dict[str, str]]()
        for full in file.shapes:
            place, middle, tensor = full.partition(f".{HOLDER}.{name}.")
            if middle:
                places.setdefault((_block(place), "attention" in place), {})[tensor] = full
            else:
                self.wrong.append(f"unknown {full}")
        if not places:
            raise CheckpointError(f"{file.path} holds no tensors of {name!r}, which {CONFIG} names")
        there, adapters = injections(model), options["adapters"]
        if missing := [each for each in adapters if each not in there]:
            raise CheckpointError(
                f"{file.path} fuses {', '.join(adapters)}: first load {', '.join(missing)}, each with "
                "peftcore.load(model, folder, name=...)"
            )
        sites = _fused(model, host_map(model), adapters, str(file.path), HostMismatch)
        move = find_move((block for block, _ in places), {block for block, _ in sites}, f"the fusion in {file.path}")
        chosen = list(self._sites(sites, places, move))
        self.names = {site.module_path: names for site, names in zip(chosen, places.values(), strict=True)}
        envelope = composed(
            [options],
            [{"": [SavedSite.of(site) for site in chosen]}],
            dtypes=file.dtypes.values(),
            target=[site.module_path for site in chosen],
        )
        super().__init__(envelope, file.path)

    def _sites(self, sites: dict[Place, Site], places: dict[Place, Any], move: Any) -> Iterator[Site]:
        for block, attention in places:
            place = (move(block), attention)
            if place not in sites:
                where = "attention" if attention else "feed-forward"
                raise HostMismatch(
                    f"{self.file.path} fuses at the {where} of {place[0]}, where its adapters do not act: load "
                    "adapters that act at it"
                )
            yield sites[place]

    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        wrong, used, tensors = list(self.wrong), set[str](), dict[str, Tensor]()
        for graft in surgeon.grafts:
            found = Found(self.names[graft.site.module_path], self.file.shapes, self._value, wrong, used)
            operator: Any = graft.operator
            square, width = operator.query.shape, operator.bias.shape
            found.take("key.bias", width)  # adds the same to all scores of a token, so that it changes nothing
            ours = {"query": ("query.weight", square), "bias": ("query.bias", width), "key": ("key.weight", square)}
            if operator.value is not None:
                ours["value"] = ("value.weight", square)
            tensors |= {f"{graft.key}.{own}": found.take(theirs, shape) for own, (theirs, shape) in ours.items()}
        wrong += [f"unknown {name}" for name in sorted(self.file.shapes.keys() - used)]
        if strict and wrong:
            raise CheckpointError(f"{self.where}: {'; '.join(dict.fromkeys(wrong))}")
        return tensors

    def _value(self, name: str) -> torch.Tensor:
        return self.file.read([name])[name]


def _block(place: str) -> str:
    """Returns a path up to its first number, which is the path of the block."""
    steps = place.split(".")
    last = next((index for index, step in enumerate(steps) if step.isdecimal()), len(steps) - 1)
    return ".".join(steps[: last + 1])
