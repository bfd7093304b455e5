"""Computes how many parameters a method trains with its default options, in well-known models.

The models are built on the meta device, so nothing is allocated or downloaded. Models of libraries that are not
installed are left out.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.injection.applying import plan


def _library(name: str, model: str, config: str = "", **sizes: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds ``name.model(name.config(**sizes))``, or ``name.model(**sizes)``."""

    def build() -> nn.Module:
        library = importlib.import_module(name)
        made = getattr(library, model)
        host: nn.Module = made(getattr(library, config)(**sizes)) if config else made(**sizes)
        return host

    return build


REFERENCES: Mapping[str, Callable[[], nn.Module]] = {
    "Llama 2 7B": _library("transformers", "LlamaForCausalLM", "LlamaConfig"),
    "BERT base": _library("transformers", "BertForSequenceClassification", "BertConfig"),
    "T5 small": _library("transformers", "T5ForConditionalGeneration", "T5Config"),
    "GPT-2": _library("transformers", "GPT2LMHeadModel", "GPT2Config"),
    "Mixtral 8x7B": _library(
        "transformers",
        "MixtralForCausalLM",
        "MixtralConfig",
        num_local_experts=8,
        num_key_value_heads=8,
        intermediate_size=14336,
    ),
    "Mamba 130M": _library("transformers", "MambaForCausalLM", "MambaConfig", hidden_size=768, num_hidden_layers=24),
    "CLIP text": _library("transformers", "CLIPTextModel", "CLIPTextConfig"),
    "ViT base": _library("transformers", "ViTForImageClassification", "ViTConfig"),
    "ResNet-50": _library("transformers", "ResNetForImageClassification", "ResNetConfig"),
    "SD 1.5 UNet": _library("diffusers", "UNet2DConditionModel", cross_attention_dim=768),
    "DiT-XL/2": _library(
        "diffusers",
        "DiTTransformer2DModel",
        num_attention_heads=16,
        attention_head_dim=72,
        num_layers=28,
        sample_size=32,
    ),
}
"""Functions that build the reference hosts, by name."""


@functools.cache
def reference(name: str) -> nn.Module | None:
    """Builds and returns a reference host on the meta device; None if its library is not installed."""
    try:
        with torch.device("meta"):
            return REFERENCES[name]()
    except ImportError:
        return None


def budgets(method: str) -> dict[str, int]:
    """Returns the number of trainable values of `method` with its default options, by name of a reference host. Hosts
    in which the method finds no target are left out. The result is empty if some option has no default.
    """
    found = {}
    for name in REFERENCES:
        host = reference(name)
        if host is None:
            continue
        try:
            found[name] = plan(host, method).trainable
        except PeftcoreError:
            continue
    return found
