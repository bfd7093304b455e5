"""What the layer of MOELoRA's authors gives for rows of two tasks, on tensors of sines:
``python -m peftcore.testing.freeze moelora.py CHECKOUT``."""

import importlib
import math
from pathlib import Path

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "liuqidong07/MOELoRA-peft", "2d9efa4", "src/MLoRA/peft/tuners/mmoelora.py")
VERSIONS = ("torch", "transformers")
EXPERTS, TASKS, WIDTH = 2, 3, 6


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output ``[tokens, rows, features]`` for rows of the tasks 2 and 0, and gradients, all flat; those of
    the table of tasks without the row that no task reads."""
    importlib.import_module("transformers")
    module = load(checkout / SOURCE.script, root=checkout)
    layer = module.MMOELoraLinear(
        "one", 5, 4, r=4, lora_alpha=3.0, expert_num=EXPERTS, task_num=TASKS, task_embedding_dim=WIDTH
    ).double()
    A = [each.mlp.weight for each in layer.lora_A["one"].loraA]
    B = [each.mlp.weight for each in layer.lora_B["one"].loraB]
    table, gate = layer.lora_task_embedding["one"].weight, layer.lora_gate["one"].GateL.weight
    with torch.no_grad():
        layer.weight.copy_(wave(4, 5, step=1.1))
        layer.bias.copy_(wave(4, step=1.3))
        table[:TASKS].copy_(wave(TASKS, WIDTH, step=0.7))
        gate.copy_(wave(EXPERTS, WIDTH, step=0.5))
        for weights, values in ((A, wave(EXPERTS, 2, 5, step=1.7)), (B, wave(EXPERTS, 4, 2, step=2.3))):
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)
    y = layer(wave(2, 3, 5, step=0.9).transpose(0, 1), task_id=torch.tensor([2, 0]))
    (y * wave(2, 3, 4, step=0.3).transpose(0, 1)).sum().backward()
    parts = {"A": torch.stack([each.grad for each in A]), "B": torch.stack([each.grad for each in B])}
    found = {"y": y.transpose(0, 1), **parts, "vectors": table.grad[:TASKS], "gate": gate.grad}
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}
