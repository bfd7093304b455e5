"""Reads and writes LoRA files of diffusers, ``pytorch_lora_weights.safetensors``, for one or several models of a
pipeline.

Tensors have peft's names, with the name of a model in front (``unet.``, ``text_encoder.``) or without it. Since 2025
the header also has peft's options, which are read as in a folder of peft. In files without these options, alpha is a
tensor; if that is missing, alpha = rank. Older names are read too: ``to_q.lora.down``, ``processor.to_q_lora.down``
and, in text encoders, ``q_proj.lora_linear_layer.down``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from peftcore.errors import CheckpointError, ExportError
from peftcore.files.added_rows import check_no_rows
from peftcore.files.formats.description import Description, unique
from peftcore.files.formats.file_options import Keys
from peftcore.files.formats.format import Content, Files, Format, Tensors
from peftcore.files.formats.peft import NEUTRAL, PeftContent, described
from peftcore.files.formats.peft_method import peft_method
from peftcore.files.formats.peft_module_names import PREFIXES, once
from peftcore.files.formats.peft_writing import written
from peftcore.files.formats.pipelines import PipelinePart, fitting, is_text_encoder, is_unet, names_in, only_file, split
from peftcore.files.safe_io import TensorFile, parse_json
from peftcore.injection.injection import Injection

TENSORS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
"""The header's key of peft's options. Each option has the name of its model in front, as the tensors do."""
A, B, BIAS, ALPHA, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha", "lora_magnitude_vector"
LEAVES = {
    A: A,
    B: B,
    BIAS: BIAS,
    ALPHA: ALPHA,
    MAGNITUDE: MAGNITUDE,
    f"{MAGNITUDE}.weight": MAGNITUDE,
    "lora.down.weight": A,
    "lora.up.weight": B,
    "lora_linear_layer.down.weight": A,
    "lora_linear_layer.up.weight": B,
}
"""Maps the names of tensors below a module to peft's names."""
OF_PROCESSORS = {"down.weight": A, "up.weight": B, ALPHA: ALPHA}
"""Maps older names of tensors below ``processor.to_q_lora`` to peft's names."""
LAYERS: tuple[dict[str, str], ...] = (
    {"to_out": "to_out.0"},
    {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
)
"""The layers that ``to_q_lora``, ``to_k_lora`` and so on belong to: first in diffusers' attention, then in the
attention of text encoders."""


@dataclass(frozen=True)
class DiffusersTensorName:
    """The parsed name of a tensor."""

    path: str
    layer: str
    """The layer in an old name with a processor: ``to_q`` in ``processor.to_q_lora``. Empty for other names."""
    leaf: str

    def at(self, layers: Mapping[str, str]) -> tuple[str, str]:
        """Returns the module's path and the tensor's name below the module. `layers` has the path of each layer that an
        old name means."""
        last = layers.get(self.layer, self.layer)
        return f"{self.path}.{last}".strip("."), self.leaf


def understood(name: str) -> DiffusersTensorName | None:
    """Returns the parsed name of a tensor of a LoRA; None for any other name."""
    name = name.replace(".processor.", ".")
    for leaf, ours in LEAVES.items():
        if name.endswith(f".{leaf}") and not name.removesuffix(f".{leaf}").endswith("_lora"):
            return DiffusersTensorName(name.removesuffix(f".{leaf}"), "", ours)
    for leaf, ours in OF_PROCESSORS.items():
        if name.endswith(f"_lora.{leaf}"):
            path, _, layer = name.removesuffix(f"_lora.{leaf}").rpartition(".")
            return DiffusersTensorName(path, layer, ours)
    return None


def _is_pefts(name: str) -> bool:
    """Whether a tensor's name has peft's prefix, as in folders of peft, whose options are in another file."""
    return name.startswith(PREFIXES)


class Diffusers(Format):
    """The format of diffusers' LoRA files."""

    name = "diffusers"
    file = TENSORS
    parts: ClassVar[tuple[str, ...]] = (
        "unet", "transformer", "transformer_2", "transformer_ref", "text_encoder", "text_encoder_2", "text_encoder_3",
        "prior", "connectors", "text_conditioner",
    )  # fmt: skip

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        file = only_file(path, TENSORS)
        names = names_in(file)
        if file is None or not names:  # one that cannot be read is refused by `open`, with the reason
            return file is not None and file.name == TENSORS
        if METADATA in TensorFile(file).metadata:
            return True
        said = [understood(name) for name in names]
        return any(each and each.leaf != ALPHA for each in said) and not any(map(_is_pefts, names))

    def open(self, path: Path, model: nn.Module) -> Content:
        file = TensorFile(only_file(path, TENSORS) or path / TENSORS)
        parts, strange = parts_of(file, dict(model.named_modules()))
        part, _ = fitting(parts, model, file.path)
        options, names, exact = _said(file, part)
        keys = Keys(options, file.path)
        keys.pass_over(*NEUTRAL)
        method = peft_method(keys.take("peft_type", str, "LORA"), file.path)
        content = PeftContent(keys, file, names, method, model, exact)
        content.sorted.wrong += [f"unknown {name}" for name in strange]
        return content

    def describe(self, path: Path) -> Description:
        file = TensorFile(only_file(path, TENSORS) or path / TENSORS)
        held = split(list(file.shapes), _model_of)
        parts = [_part(name, names, file, LAYERS[0]) for name, names in held.items()]
        said = [_said(file, part) for part in parts]
        each = [described(self.name, Keys({"peft_type": "LORA", **options}, file.path), file, names)
                for options, names, _ in said]  # fmt: skip
        fronts = [f"{part.name}." if part.name else "" for part in parts]
        return Description(
            self.name,
            (file,),
            methods=unique(name for one in each for name in one.methods),
            kind=" and ".join(unique(one.kind for one in each)),
            options={front + key: value for front, one in zip(fronts, each, strict=True)
                     for key, value in one.options.items()},
            base=next((one.base for one in each if one.base), ""),
            parts=tuple(part.name for part in parts if part.name),
            sites=tuple(front + site for front, one in zip(fronts, each, strict=True) for site in one.sites),
            problem=next((one.problem for one in each if one.problem), ""),
        )  # fmt: skip

    def files(self, injection: Injection, weights: bool = False) -> Files:
        options, tensors = written(injection)
        if options["peft_type"] != "LORA":
            raise ExportError(f"diffusers loads only LoRA and DoRA, not {injection.method.name}")
        if injection.trained_along:
            raise ExportError(
                f"diffusers' files cannot hold {injection.trained_along[0]}, which trains with the adapter"
            )
        check_no_rows(injection, "diffusers")
        model = injection.model
        guess = "unet" if is_unet(model) else "text_encoder" if is_text_encoder(model) else "transformer"
        prefix = f"{self.part or guess}."
        values = {prefix + name.removeprefix(PREFIXES[0]): value for name, value in tensors.items()}
        said = {prefix + name: value for name, value in options.items()}
        return {TENSORS: Tensors(values, {METADATA: json.dumps(said, indent=2, sort_keys=True)})}


def _model_of(name: str) -> str | None:
    """Returns the name of the pipeline's model at the start of a tensor's name; None if there is none."""
    first, dot, _ = name.partition(".")
    return first if dot and first in Diffusers.parts else None


def _said(file: TensorFile, part: PipelinePart) -> tuple[dict[str, Any], dict[str, str], dict[str, dict[str, Any]]]:
    """Returns three mappings for one model of the pipeline: peft's options; the names of its tensors in the file, keyed
    by peft's names; and options of single modules, keyed by path."""
    said = parse_json(file.metadata[METADATA], file.path) if METADATA in file.metadata else {}
    prefix = f"{part.name}." if part.name else ""
    options = {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}
    names, exact = dict(part.names), dict[str, dict[str, Any]]()
    if not options:
        options, exact = _inferred(file, names)
    return options, names, exact


def parts_of(file: TensorFile, modules: Mapping[str, nn.Module]) -> tuple[list[PipelinePart], list[str]]:
    """Returns two lists: the models of a pipeline for which a file has adapters, and the tensor names that belong to no
    model. Old names are ambiguous, so a model appears once for each of their possible meanings."""

    full = list(file.shapes)
    whole = _part("", full, file, LAYERS[0])
    groups = split(full, _model_of)
    here = bool(whole.outputs) and whole.outputs.keys() <= modules.keys()  # a host that holds the pipeline's models
    if here or set(groups) == {""}:
        return [_part("", full, file, layers) for layers in LAYERS], []
    strange = groups.pop("", [])
    return [_part(name, held, file, layers) for name, held in groups.items() for layers in LAYERS], strange


def _part(name: str, held: Sequence[str], file: TensorFile, layers: Mapping[str, str]) -> PipelinePart:
    prefix = f"{name}." if name else ""
    outputs: dict[str, int] = {}

    def pairs() -> Iterator[tuple[str, str]]:
        for full in held:
            said = understood(full.removeprefix(prefix))
            if said is None:
                yield full.removeprefix(prefix), full
                continue
            path, leaf = said.at(layers)
            outputs.setdefault(path, -1)
            if leaf == B and file.shapes[full]:
                outputs[path] = file.shapes[full][0]
            yield f"{path}.{leaf}", full

    return PipelinePart(name, once(pairs(), file.path), outputs)


def _inferred(file: TensorFile, names: dict[str, str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns peft's options for the adapter and for each module, inferred from shapes and from tensors named alpha.
    The latter are removed from `names`."""
    alphas = {name.removesuffix(f".{ALPHA}"): names.pop(name) for name in list(names) if name.endswith(f".{ALPHA}")}
    values = file.read(alphas.values())
    exact: dict[str, dict[str, Any]] = {}
    for name, full in names.items():
        path, shape = name.removesuffix(f".{A}"), file.shapes[full]
        if name == path or not shape:
            continue
        exact[path] = {"r": shape[0], "lora_alpha": shape[0]}
    for path, full in alphas.items():
        if values[full].numel() != 1 or path not in exact:
            raise CheckpointError(f"{file.path}: {full} is not the alpha of a LoRA in this file")
        exact[path]["lora_alpha"] = float(values[full])
    first: dict[str, Any] = next(iter(exact.values()), {})
    said = {
        "use_dora": any(name.endswith(f".{MAGNITUDE}") for name in names),
        "lora_bias": any(name.endswith(f".{BIAS}") for name in names),
    }
    return {**first, **said}, exact
