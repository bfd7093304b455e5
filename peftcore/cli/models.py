"""The model of a comparison: loaded from a folder, with a classification head on top that every method trains alike."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from peftcore.cli.errors import BadInput

UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""What transformers raises for a folder that holds no model, half a model or a model of another kind."""


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; one without a padding token (most decoders) pads with its end-of-text token."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; --model takes a folder with config.json, weights and tokenizer")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except UNREADABLE as error:
        raise unreadable(folder, "tokenizer", error) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BadInput(f"{folder}: its tokenizer has no padding and no end-of-text token to fill up batches with")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, labels: tuple[str, ...], tokenizer: Any, seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A fresh copy of the model and the names of its head modules; what is newly initialised is drawn from ``seed``."""
    transformers.set_seed(seed)
    try:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder,
            local_files_only=True,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            pad_token_id=tokenizer.pad_token_id,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise unreadable(folder, "model for sequence classification", error) from error
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    return model, head_modules(model, {*info["missing_keys"], *mismatched}, folder)


def head_modules(model: Any, fresh: Set[str], folder: Path) -> tuple[str, ...]:
    """The parts outside the base model, and parts of the base of which nothing was in the folder (a pooler, say).

    They start from nothing or from another task, so every method has to train them. What else is missing must not be.
    """
    prefix = model.base_model_prefix
    outside = parts(model)
    base = outside.pop(prefix, None)
    if base is None or not outside:
        raise BadInput(f"{folder}: {type(model).__qualname__} has no classification head beside its base model")
    names = {
        path: {f"{prefix}.{path}.{name}" for name, _ in part.named_parameters()} for path, part in parts(base).items()
    }
    new = [f"{prefix}.{path}" for path in names if fresh >= names[path]]
    head = (*outside, *(new if len(new) < len(names) else ()))
    covered = tuple(f"{name}." for name in head)
    astray = [name for name, _ in model.named_parameters() if name in fresh and not name.startswith(covered)]
    if astray:
        raise BadInput(f"{folder}: its weights do not fit its config; missing or misshaped: {astray[0]}")
    return head


def parts(module: nn.Module) -> dict[str, nn.Module]:
    """The children that have parameters."""
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def unreadable(folder: Path, what: str, error: Exception) -> BadInput:
    reason = " ".join(str(error).split())
    return BadInput(f"{folder}: cannot load a {what} from it ({reason[:300]})")
