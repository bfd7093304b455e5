"""A small Llama whose adapters are exported, and how programs for language models read what was written."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import peftcore
from peftcore.testing.kit import fill

IDS = torch.arange(14).view(2, 7) % 20
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **SIZES, **sizes)).double().eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def noisy(model: nn.Module, method: Any, **options: Any) -> peftcore.Injection:
    """A method on a model, with noise in every tensor."""
    injection = peftcore.apply(model, method, dtype="float64", **options)
    fill(injection, 1)
    return injection


@torch.no_grad()
def as_a_server(folder: Path) -> Tensor:
    """What a program computes that knows the factors of LoRA and one alpha, as llama.cpp and SGLang: the alpha over
    the rank of each factor, and nothing of what else is in the configuration."""
    model = llama()
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            B = tensors[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(path).weight += alpha / len(A) * (B @ A)
    return logits(model)
