"""What the layer of HydraLoRA's authors gives for two tokens, on tensors of sines; what it starts from and trains, and
their options: ``python -m peftcore.testing.freeze hydralora.py CHECKOUT``."""

import importlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "Clin0212/HydraLoRA", "afb693b", "HydraLoRA/peft/tuners/lora.py")
VERSIONS = ("torch", "transformers")


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def theirs(checkout: Path) -> Any:
    importlib.import_module("transformers")  # the installed one: the checkout has an old one of its own
    return load(checkout / SOURCE.script, root=checkout / "HydraLoRA")


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output, and the gradients of the factors and of the gate, all flat. The softmax is in float32."""
    layer = theirs(checkout).Linear(5, 4, r=2, lora_alpha=3.0, lora_nums=3)
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


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of a layer with 2000 inputs are drawn from, at 20 heads of rank 20."""
    layer = theirs(checkout).Linear(2000, 3, r=20, lora_nums=20)
    heads = torch.stack([layer.get_submodule(f"lora_B{index}").weight for index in range(20)])
    return {"A": drawn(layer.lora_A.weight), "B": drawn(heads), "gate": drawn(layer.lora_route.weight)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train of a layer ``[4, 5]`` in a model, with 3 heads of rank 2, by our names."""
    off = {"fan_in_fan_out": False, "merge_weights": False, "inference_mode": False, "enable_lora": None}
    sizes = {"r": 2, "lora_alpha": 3.0, "lora_dropout": 0.0, "lora_nums": 3, "target_modules": ["0"], "bias": "none"}
    model = theirs(checkout).LoraModel(SimpleNamespace(**off, **sizes), nn.Sequential(nn.Linear(5, 4)))
    found = {"A": 0, "B": 0, "gate": 0}
    for name, each in model.model.named_parameters():
        if each.requires_grad:
            found[{"lora_A": "A", "lora_B": "B", "lora_route": "gate"}[name.split(".")[1].rstrip("012")]] += (
                each.numel()
            )
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script for fine-tuning; some of its variables have a blank behind the sign."""
    told = flags((checkout / "HydraLoRA/fine-tuning.sh").read_text().replace("= ", "="))
    names = {"rank": "lora_rank", "heads": "lora_nums", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    return {ours: told[name] for ours, name in names.items()}
