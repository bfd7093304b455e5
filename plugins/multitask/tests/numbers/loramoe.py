"""What the layer of LoRAMoE's authors gives for two rows of three tokens, on tensors of sines:
``python -m peftcore.testing.freeze loramoe.py CHECKOUT``."""

import importlib
import math
from pathlib import Path

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "Ablustrund/LoRAMoE", "1177288", "peft/tuners/lora.py")
VERSIONS = ("torch", "transformers")
EXPERTS = 4


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output, the balancing loss for rows of types 1 and 0, and the gradients of either, all
    flat. The softmax and the loss are in float32."""
    importlib.import_module("transformers")  # the installed one: the checkout has an old one of its own
    layer = load(checkout / SOURCE.script, root=checkout).Linear(
        5, 4, r=2, lora_alpha=3.0, lora_nums=EXPERTS, blc_alpha=0.2, blc_weight=0.3
    )
    layer.double()
    parts = {
        name: [layer.get_submodule(f"lora_{name}{index}").weight for index in range(EXPERTS)] for name in ("A", "B")
    }
    with torch.no_grad():
        layer.weight.copy_(wave(4, 5, step=1.1))
        layer.bias.copy_(wave(4, step=1.3))
        layer.lora_route.weight.copy_(wave(EXPERTS, 5, step=0.7))
        for name, values in {"A": wave(EXPERTS, 2, 5, step=1.7), "B": wave(EXPERTS, 4, 2, step=2.3)}.items():
            for weight, value in zip(parts[name], values, strict=True):
                weight.copy_(value)
    y, loss = layer(wave(2, 3, 5, step=0.9), task_types=torch.tensor([1, 0]))
    gate = layer.lora_route.weight
    (of_loss,) = torch.autograd.grad(loss, gate, retain_graph=True)
    (y * wave(2, 3, 4, step=0.3)).sum().backward()
    A, B = (torch.stack([weight.grad for weight in parts[name]]) for name in ("A", "B"))
    found = {"y": y, "loss": loss, "A": A, "B": B, "gate": gate.grad, "gate of the loss": of_loss}
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}
