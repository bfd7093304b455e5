"""What the layer of MixLoRA's authors makes of two rows of four tokens, around the feed-forward of a Llama, on tensors
of sines: ``python -m peftcore.testing.freeze mixlora.py CHECKOUT``."""

import math
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "TUDB-Labs/MixLoRA", "d59d09b", "mixlora/model.py")
VERSIONS = ("torch", "transformers")
D, INNER, EXPERTS, RANK = 6, 10, 4, 2
MATRICES = ("gate_proj", "up_proj", "down_proj")


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output, and the gradients of the input, of the router and of each matrix's A and B, all flat."""
    module = load(checkout / SOURCE.script, root=checkout)
    base = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=INNER, num_attention_heads=1)).double()
    options = {"r": RANK, "lora_alpha": 3, "lora_dropout": 0.5, "num_experts": EXPERTS, "top_k": 2, "act_fn": "silu"}
    names = {"peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "target_modules": []}
    config = module.MixLoraConfig.from_config({**options, **names, "bias": "none", "routing_strategy": "mixlora"})
    config.model_type_, config.dtype_ = "llama", torch.float64
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
