"""What the layer of HydraLoRA's authors gives for two tokens, on tensors of sines:
``python -m peftcore.testing.freeze hydralora.py CHECKOUT``."""

import importlib
import math
from pathlib import Path

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "Clin0212/HydraLoRA", "afb693b", "HydraLoRA/peft/tuners/lora.py")
VERSIONS = ("torch", "transformers")


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output, and the gradients of the factors and of the gate, all flat. The softmax is in float32."""
    importlib.import_module("transformers")  # the installed one: the checkout has an old one of its own
    layer = load(checkout / SOURCE.script, root=checkout / "HydraLoRA").Linear(5, 4, r=2, lora_alpha=3.0, lora_nums=3)
    layer.double()
    heads = [layer.get_submodule(f"lora_B{index}").weight for index in range(3)]
    with torch.no_grad():
        layer.weight.copy_(wave(4, 5, step=1.1))
        layer.bias.copy_(wave(4, step=1.3))
        layer.lora_A.weight.copy_(wave(2, 5, step=1.7))
        layer.lora_route.weight.copy_(wave(3, 5, step=0.7))
        for head, value in zip(heads, wave(3, 4, 2, step=2.3), strict=True):
            head.copy_(value)
    y, _ = layer(wave(1, 2, 5, step=0.9))
    (y * wave(1, 2, 4, step=0.3)).sum().backward()
    B = torch.stack([head.grad for head in heads])
    found = {"y": y, "A": layer.lora_A.weight.grad, "B": B, "gate": layer.lora_route.weight.grad}
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}
