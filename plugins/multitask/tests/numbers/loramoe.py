"""What the layer of LoRAMoE's authors gives for two rows of three tokens, on tensors of sines; what it
starts from and trains, and their options: ``python -m peftcore.testing.freeze loramoe.py CHECKOUT``."""

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

SOURCE = Source("authors", "Ablustrund/LoRAMoE", "1177288", "peft/tuners/lora.py")
VERSIONS = ("torch", "transformers")
EXPERTS = 4


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def theirs(checkout: Path) -> Any:
    importlib.import_module("transformers")  # the installed one: the checkout has an old one of its own
    return load(checkout / SOURCE.script, root=checkout)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output, the balancing loss for rows of types 1 and 0, and the gradients of either, all
    flat. The softmax and the loss are in float32."""
    layer = theirs(checkout).Linear(5, 4, r=2, lora_alpha=3.0, lora_nums=EXPERTS, blc_alpha=0.2, blc_weight=0.3)
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


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of a layer with 2000 inputs are drawn from, of 20 experts of rank 2."""
    layer = theirs(checkout).Linear(2000, 3, r=2, lora_nums=20, blc_alpha=0.0, blc_weight=0.0)
    A, B = (torch.stack([layer.get_submodule(f"lora_{name}{index}").weight for index in range(20)]) for name in "AB")
    return {"A": drawn(A), "B": drawn(B), "gate": drawn(layer.lora_route.weight)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train of a layer ``[4, 5]`` in a model, with experts of rank 2, by our names."""
    off = {"fan_in_fan_out": False, "merge_weights": False, "inference_mode": False, "enable_lora": None}
    sizes = {"r": 2, "lora_alpha": 3.0, "lora_dropout": 0.0, "lora_nums": EXPERTS, "target_modules": ["0"]}
    config = SimpleNamespace(**off, **sizes, bias="none", blc_alpha=0.0, blc_weight=0.0)
    model = theirs(checkout).LoraModel(config, nn.Sequential(nn.Linear(5, 4)))
    found = {"A": 0, "B": 0, "gate": 0}
    for name, each in model.model.named_parameters():
        if each.requires_grad:
            kind = name.split(".")[1].rstrip("0123")
            found[{"lora_A": "A", "lora_B": "B", "lora_route": "gate"}[kind]] += each.numel()
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script."""
    told = flags((checkout / "run_loramoe.sh").read_text())
    names = {"rank": "lora_rank", "experts": "lora_nums", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    names |= {"balance": "blc_weight", "delta": "blc_alpha"}
    return {ours: told[name] for ours, name in names.items()}
