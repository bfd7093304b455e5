"""What the layer of MixLoRA's authors makes of two rows of four tokens, around the feed-forward of a Llama, on tensors
of sines; what it starts from, and its options: ``python -m peftcore.testing.freeze mixlora.py CHECKOUT``."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "TUDB-Labs/MixLoRA", "d59d09b", "mixlora/model.py")
VERSIONS = ("torch", "transformers")
D, INNER, EXPERTS, RANK = 6, 10, 4, 2
MATRICES = ("gate_proj", "up_proj", "down_proj")


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def configured(module: Any, options: dict[str, Any]) -> Any:
    names = {"peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "target_modules": []}
    config = module.MixLoraConfig.from_config({**options, **names, "bias": "none", "routing_strategy": "mixlora"})
    config.model_type_ = "llama"
    return config


def readme(checkout: Path) -> dict[str, Any]:
    """Returns the options of the configurations in their README for LoRA and for routing to the largest gates."""
    blocks = re.findall(r"```json\n(.*?)```", (checkout / "README.md").read_text(), re.DOTALL)
    lines = [each for block in blocks if '"mixlora",' in block or '"lora_0",' in block for each in block.splitlines()]
    found = (re.fullmatch(r'\s*"(\w+)": ([^{}]*?),?', line) for line in lines)
    return {each[1]: json.loads(each[2]) for each in found if each}


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output, and the gradients of the input, of the router and of each matrix's A and B, all flat."""
    module = load(checkout / SOURCE.script, root=checkout)
    base = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=INNER, num_attention_heads=1)).double()
    options = {"r": RANK, "lora_alpha": 3, "lora_dropout": 0.5, "num_experts": EXPERTS, "top_k": 2, "act_fn": "silu"}
    config = configured(module, options)
    config.dtype_ = torch.float64
    layer = module.MixLoraSparseMoe(base, config)
    layer.gate_ = wave(EXPERTS, D, step=0.7).requires_grad_()
    factors: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for number, name in enumerate(MATRICES):
            matrix = base.get_submodule(name)
            outputs, inputs = matrix.weight.shape
            matrix.weight.copy_(wave(outputs, inputs, step=1.1 + number))
            A, B = wave(EXPERTS, RANK, inputs, step=1.7 + number), wave(EXPERTS, outputs, RANK, step=2.3 + number)
            for expert in range(EXPERTS):
                update = module.LoraLinear(matrix, config, (A[expert], B[expert])).eval()
                layer.experts_[f"experts.{expert}.{name}"] = update
                factors.setdefault(f"{name}.A", []).append(update.lora_A.weight)
                factors.setdefault(f"{name}.B", []).append(update.lora_B.weight)
    x = wave(2, 4, D, step=0.9).requires_grad_()
    y = layer(x)
    (y * wave(2, 4, D, step=0.3)).sum().backward()
    grads = {name: torch.stack([each.grad for each in found]) for name, found in factors.items()}
    found = {"y": y, "x": x.grad, "router": layer.gate_.grad, **grads}
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the factors of an update are drawn from, of 2000 inputs at rank 20; and the deviation of the router,
    which is drawn in their trainer."""
    module = load(checkout / SOURCE.script, root=checkout)
    config = configured(module, {**readme(checkout), "r": 20})
    config.dtype_ = torch.float32
    update = module.LoraLinear(nn.Linear(2000, 4), config)
    return {"A": drawn(update.lora_A.weight), "B": drawn(update.lora_B.weight), "router": config.router_init_range_}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of the configurations in their README."""
    config = configured(load(checkout / SOURCE.script, root=checkout), readme(checkout))
    return {
        "experts": config.num_experts_,
        "top_k": config.top_k_,
        "rank": config.lora_r_,
        "alpha": config.lora_alpha_,
        "dropout": config.lora_dropout_,
        "balance": config.router_aux_loss_coef_,
    }
