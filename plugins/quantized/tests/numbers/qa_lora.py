"""What the layer of QA-LoRA's authors adds to outputs, on tensors of sines, what it starts from, what trains of a small
Llama, and their options, on peft 0.4 and transformers 4.41:
``python -m peftcore.testing.freeze qa_lora.py CHECKOUT``."""

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "yuhuixu1993/qa-lora", "91604c7", "peft_utils.py")
VERSIONS = ("torch", "peft", "transformers")


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


def layers(checkout: Path) -> Any:
    """Returns the module of their layer."""
    sys.modules["auto_gptq.modeling._base"] = MagicMock()  # it stands inside of that package, beside its models
    spec = importlib.util.spec_from_file_location("auto_gptq.utils.peft_utils", checkout / SOURCE.script)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def numbers(checkout: Path) -> list[list[float]]:
    """Returns what is added to two outputs of width 5, in groups of 4 of 12 inputs."""
    module = layers(checkout)
    module.group_size = 4
    host, x = nn.Linear(12, 5), 5 * wave(2, 12, step=2.1)
    layer = module.GPTQLoraLinear("default", host, r=3, lora_alpha=5).double()
    layer.lora_A.default.weight.copy_(wave(3, 3, step=1.1))
    layer.lora_B.default.weight.copy_(wave(5, 3, step=1.7))
    host.weight.zero_()
    host.bias.zero_()
    found: list[list[float]] = layer(x).tolist()
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what a layer ``[16, 20480]`` starts from, at rank 64."""
    layer = layers(checkout).GPTQLoraLinear("default", nn.Linear(20480, 16), r=64, lora_alpha=16)
    return {"A": drawn(layer.lora_A.default.weight), "B": drawn(layer.lora_B.default.weight)}


def script(checkout: Path) -> Any:
    """Returns the module of their script."""
    absent = ("datasets", "evaluate", "auto_gptq", "auto_gptq.utils", "auto_gptq.utils.peft_utils")
    return load(checkout / "qalora.py", absent=(*absent, "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"))


def trains(checkout: Path) -> dict[str, int]:
    """Returns what trains of a small Llama at rank 2, by name: how many numbers."""
    module = layers(checkout)
    sizes: Any = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 9}
    llama = script(checkout).prepare_model_for_int8_training(LlamaForCausalLM(LlamaConfig(hidden_size=64, **sizes)))
    model = SimpleNamespace(model=llama, lm_head_name="lm_head", named_modules=llama.named_modules, trainable=True)
    model.fused_attn_module_type, model.injected_fused_attention, model.injected_fused_mlp = None, False, False
    config = module.GPTQLoraConfig(r=2, lora_alpha=16, task_type="CAUSAL_LM")
    named = module.get_gptq_peft_model(model, config, train_mode=True).named_parameters()
    return {name.removeprefix("base_model.model."): each.numel() for name, each in named if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of their script, and the size of a group in the layer's module."""
    told, size = script(checkout).TrainingArguments.__dataclass_fields__, layers(checkout).group_size
    names = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    return {**{ours: told[theirs].default for ours, theirs in names.items()}, "group_size": size}
