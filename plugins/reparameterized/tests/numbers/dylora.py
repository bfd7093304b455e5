"""What DyLoRA's authors' own layer computes at each rank, and its gradients:
``python -m peftcore.testing.freeze dylora.py CHECKOUT``.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "huawei-noah/Efficient-NLP", "bb44348", "DyLoRA/loralib/layers.py")
VERSIONS = ("torch",)
INPUTS, OUTPUTS, RANK, ALPHA = 6, 5, 4, 3


def wave(*shape: int) -> Tensor:
    """Numbers that everybody can make again."""
    return torch.sin(torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) ** 1.5).view(shape)


def tensors() -> dict[str, Tensor]:
    """Returns the weight and the bias of a layer, both factors, and an input."""
    layer = {"weight": (OUTPUTS, INPUTS), "bias": (OUTPUTS,)}
    shapes = layer | {"A": (RANK, INPUTS), "B": (OUTPUTS, RANK), "x": (3, INPUTS)}
    return {name: wave(*shape) / (index + 1) for index, (name, shape) in enumerate(shapes.items())}


def run(layers: Any, rank: int, frozen: bool, training: bool) -> dict[str, list[Any]]:
    given = tensors()
    layer = layers.Linear(INPUTS, OUTPUTS, r=RANK, lora_alpha=ALPHA, merge_weights=False).double()
    with torch.no_grad():
        for name, own in (("weight", layer.weight), ("bias", layer.bias), ("A", layer.lora_A), ("B", layer.lora_B)):
            own.copy_(given[name])
    layer.set_rank(rank - 1, frozen=frozen)  # theirs counts from 0
    layer.nd_lora_A.training = layer.nd_lora_B.training = training
    x = given["x"].requires_grad_()
    output = layer(x)
    (output * wave(*output.shape)).sum().backward()
    grads = {"A": layer.lora_A.grad, "B": layer.lora_B.grad, "x": x.grad}
    return {"output": output.tolist(), **{name: grad.tolist() for name, grad in grads.items()}}


def numbers(checkout: Path) -> dict[str, dict[str, list[Any]]]:
    """Returns outputs and gradients at each rank: frozen and not in training, and afterwards."""
    package = ModuleType("theirs")  # their __init__ wants a file of loralib that is not beside it
    package.__path__ = [str(checkout / Path(SOURCE.script).parent)]
    sys.modules["theirs"] = package
    layers = importlib.import_module("theirs.layers")
    modes = {"frozen": (True, True), "whole": (False, True), "evaluated": (True, False)}
    return {f"{mode} {rank}": run(layers, rank, *how) for mode, how in modes.items() for rank in range(1, RANK + 1)}
