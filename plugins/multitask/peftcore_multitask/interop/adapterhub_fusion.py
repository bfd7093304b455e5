"""AdapterFusion in AdapterHub's folders (checked against adapters 1.3.0): ``adapter_fusion_config.json`` and
``model_adapter_fusion.safetensors``, for reading.

The folder has the fusion alone. The adapters that it fuses are loaded before, each from its own folder and under its
name there; then ``peftcore.activate(model, Fuse("a", "b", by="fusion"))``. Where a norm ends a block, that
library mixes what adapters return in front of it, and ours what blocks return: files for such models are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import Surgeon, injections
from peftcore.errors import CheckpointError, HostMismatch
from peftcore.files.envelope import SavedSite
from peftcore.files.formats.composing import composed
from peftcore.files.formats.description import Description, unique
from peftcore.files.formats.format import Content, Format
from peftcore.files.formats.found import Found
from peftcore.files.formats.keys import Keys
from peftcore.files.formats.rebasing import find_move
from peftcore.files.safe_io import TensorFile, read_json
from peftcore.injection.applying import host_map
from peftcore_additive.pfeiffer_adapter import PfeifferOperator

CONFIG, TENSORS = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
HOLDER = "adapter_fusion_layer"


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
            raise CheckpointError(f"{path} has no {TENSORS}: in adapters, save with use_safetensors=True")
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


def _read(path: Path) -> tuple[Keys, Keys]:
    whole = Keys(read_json(path / CONFIG), path / CONFIG)
    whole.pass_over("model_class", "model_name", "model_type", "hidden_size", "version")
    return whole, Keys(whole.take("config", dict), whole.where)


def _options(keys: Keys, adapters: list[str], model: nn.Module) -> dict[str, Any]:
    """Returns our options; the penalty of V, and whether V acts before or behind the sum, is the same in both.

    Raises:
        CheckpointError: ours computes something else.
    """
    keys.pass_over("regularization", "value_initialized", "value_before_softmax")
    for key in ("key", "query"):
        if not keys.take(key, bool):
            raise CheckpointError(f"{keys.where}: {key!r} is False, and ours has the matrix of it always")
    for key in ("query_before_ln", "residual_before", "temperature"):
        if keys.take(key, bool, False):
            raise CheckpointError(f"{keys.where}: {key!r} is True, which ours has no option for")
    host = getattr(vars(model).get("config"), "attention_probs_dropout_prob", 0.0)
    dropout = keys.take("dropout_prob", float, 0.0) or host
    value = keys.take("value", bool)
    keys.check_known()
    return {"method": "adapter_fusion", "adapters": adapters, "value": value, "dropout": float(dropout)}


class FusionContent(Content):
    """A fusion of AdapterHub for one host, on which its adapters are."""

    def __init__(self, file: TensorFile, name: str, options: dict[str, Any], model: nn.Module) -> None:
        self.file, self.wrong, places = file, list[str](), dict[str, dict[str, str]]()
        for full in file.shapes:
            place, middle, tensor = full.partition(f".{HOLDER}.{name}.")
            if middle:
                places.setdefault(_block(place), {})[tensor] = full
            else:
                self.wrong.append(f"unknown {full}")
        if not places:
            raise CheckpointError(f"{file.path} holds no tensors of {name!r}, which {CONFIG} speaks of")
        there, block_of = injections(model), {each.module: each.block for each in host_map(model).entries}
        if missing := [each for each in options["adapters"] if each not in there]:
            raise CheckpointError(
                f"{file.path} fuses {', '.join(options['adapters'])}: load {', '.join(missing)} before, each with "
                "peftcore.load(model, folder, name=...)"
            )
        sites = {}
        for adapter in options["adapters"]:
            for graft in there[adapter].grafts:
                if not graft.by_method:
                    continue
                operator = graft.operator
                if not isinstance(operator, PfeifferOperator) or operator.placement != "pre":
                    raise HostMismatch(
                        f"{file.path}: {adapter} acts at {graft.site.path} in front of a norm, or is none of seq_bn; "
                        "that library fuses such adapters in another way than ours, and the file is not read"
                    )
                sites[block_of.get(graft.site.module_path) or ""] = graft.site
        move = find_move(places, sites.keys(), f"the fusion in {file.path}")
        self.names = {sites[move(block)].module_path: names for block, names in places.items()}
        chosen = [sites[move(block)] for block in places]
        envelope = composed(
            [options],
            [{"": [SavedSite.of(site) for site in chosen]}],
            dtypes=file.dtypes.values(),
            target=[site.module_path for site in chosen],
        )
        super().__init__(envelope, file.path)

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
    """Returns the path up to its first number: the block that a place is in."""
    steps = place.split(".")
    last = next((index for index, step in enumerate(steps) if step.isdecimal()), len(steps) - 1)
    return ".".join(steps[: last + 1])
