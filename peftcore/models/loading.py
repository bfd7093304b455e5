"""Loads models and tokenizers for training. A classifier gets a new head, which is trained in the same way with every
method."""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.backbone_utils import BackboneMixin

from peftcore.errors import BadInput
from peftcore.injection.request import host_map
from peftcore.layers.layer import is_dense
from peftcore.models.model_names import Use, find

NO_KERNELS = {"attn_implementation": None, "experts_implementation": None}
"""Options that stop transformers from loading kernels from the Hub, because kernels are code. Transformers uses its own
kernels instead."""
UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
"""Errors that transformers raises for a folder that it cannot load. The folder may have no model, an incomplete model,
or a model of another kind. Or its model may need a package that is not installed, as quantized models do."""


def load_tokenizer(model: Path | str) -> Any:
    """Load the model's tokenizer. If the tokenizer has no padding token, its end-of-text token is used for padding."""
    named = find(model)
    named.check(Use.TEXT)
    where, options = named.origin()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
    except UNREADABLE as error:
        raise unreadable(model, "tokenizer", error) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BadInput(
                f"{model}: its tokenizer has no padding and no end-of-text token, so batches cannot be padded: add one "
                "of them"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def from_pretrained(auto: Any, model: Path | str, dtype: str = "float32", **options: Any) -> Any:
    """Load a model with its weights, by `auto`, one of transformers' Auto classes.

    Raises:
        BadInput: the model does not exist.
    """
    where, own = find(model).origin()
    try:
        found = auto.from_pretrained(where, dtype=getattr(torch, dtype), **NO_KERNELS, **own, **options)
    except UNREADABLE as error:
        words = re.findall("[A-Z][a-z]+|[A-Z]+", auto.__name__)[1:]
        raise unreadable(model, " ".join(words).lower(), error) from error
    if "gguf_file" in own:
        made_dense(found[0] if isinstance(found, tuple) else found)
    return found


def made_dense(model: Any) -> None:
    """Remove transformers' record that a model is quantized, if all its weights were dequantized on loading (GGUF
    files). With that record, transformers would refuse to train or save the model."""
    if all(map(is_dense, model.parameters())):
        model.hf_quantizer.remove_quantization_config(model)


def classifier(
    auto: Any, model: Path | str, labels: tuple[str, ...], dtype: str = "float32", **options: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """Load a model with a classification head for `labels`, by `auto`, one of transformers' Auto classes. Return the
    model and the names of its head modules."""
    loaded, info = from_pretrained(
        auto,
        model,
        dtype,
        **_without_classes(model),
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    return loaded, head_modules(loaded, {*info["missing_keys"], *mismatched}, model)


def _without_classes(model: Path | str) -> dict[str, Any]:
    """Return ``{"model_args": ...}``, the arguments that a timm model was saved with, but without its number of
    classes, which transformers would pass twice. Empty for models of other libraries."""
    where, own = find(model).origin()
    try:
        config = transformers.AutoConfig.from_pretrained(where, **own)
    except UNREADABLE:
        return {}  # loading the model says why
    if not isinstance(config, transformers.TimmWrapperConfig):
        return {}
    return {"model_args": {name: each for name, each in (config.model_args or {}).items() if name != "num_classes"}}


def head_modules(model: Any, fresh: Set[str], folder: Path | str) -> tuple[str, ...]:
    """Return the names of the modules that every method has to train, because their weights are new or from another
    task.

    They are the modules outside the base model, and modules of the base model whose tensors are not in the folder, such
    as a pooler. If no module is outside the base model, the modules with the role "head" are returned. BadInput is
    raised if any other tensor is missing.
    """
    outside = parts(model)
    backbones = [name for name, part in outside.items() if isinstance(part, BackboneMixin)]
    prefix = backbones[0] if len(backbones) == 1 else model.base_model_prefix
    base = outside.pop(prefix, None)
    if base is not None and not outside:
        outside = {
            entry.path: model.get_submodule(entry.path) for entry in host_map(model).entries if entry.role == "head"
        }
    if base is None or not outside:
        raise BadInput(f"{folder}: {type(model).__qualname__} has no classification head next to its base model")
    names = {
        path: {f"{prefix}.{path}.{name}" for name, _ in part.named_parameters()} for path, part in parts(base).items()
    }
    new = [f"{prefix}.{path}" for path in names if fresh >= names[path]]
    head = (*outside, *(new if len(new) < len(names) else ()))
    covered = tuple(f"{name}." for name in head)
    astray = [name for name, _ in model.named_parameters() if name in fresh and not name.startswith(covered)]
    if astray:
        raise BadInput(f"{folder}: its weights do not fit its config; missing or of another shape: {astray[0]}")
    return head


def parts(module: nn.Module) -> dict[str, nn.Module]:
    """Return the child modules that have parameters, by name."""
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def unreadable(folder: Path | str, what: str, error: Exception) -> BadInput:
    reason = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name:
        reason = f"{reason}: pip install {error.name.partition('.')[0]}"
    return BadInput(f"{folder}: cannot load a {what} from it ({reason[:300]})")
