"""What two modules of tiny attention of its authors give one behind the other, as in their layer of RoBERTa, on tensors
of sines: ``python -m peftcore.testing.freeze tiny_attention_adapter.py CHECKOUT``."""

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "cindermond/tiny-attn", "03eee7e", "rewriter/model/tiny_attn.py")
VERSIONS = ("torch",)
WIDTH, HEADS, COUNT = 4, 2, 2


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output, and the gradients of the input and of all tensors, each flat: ``"0.norm.weight"``."""
    module = load(checkout / SOURCE.script)
    layers = [module.TinyAttention(6, 6, WIDTH, HEADS, attention_dropout=0.0).double() for _ in range(COUNT)]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            for place, (_, tensor) in enumerate(sorted(layer.named_parameters())):
                tensor.copy_(wave(*tensor.shape, step=0.7 + 0.3 * place + 0.11 * index))
    h = wave(2, 5, 6, step=0.9).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    y = h
    for layer in layers:
        y = y + layer.train()(y, mask) / COUNT
    (y * wave(2, 5, 6, step=0.3) * mask[..., None]).sum().backward()
    assert h.grad is not None
    found = {"y": (y * mask[..., None]).flatten().tolist(), "h": h.grad.flatten().tolist()}
    for index, layer in enumerate(layers):
        found |= {f"{index}.{name}": tensor.grad.flatten().tolist() for name, tensor in layer.named_parameters()}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what tensors are drawn from, by their names, of a stream 4,200 wide and an attention of 1,400."""
    layer = load(checkout / SOURCE.script).TinyAttention(4200, 4200, 1400)
    return {name: drawn(tensor) for name, tensor in layer.named_parameters()}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of their constructor, by the names here."""
    options = inspect.signature(load(checkout / SOURCE.script).TinyAttention).parameters
    names = {"width": "attention_embd", "heads": "attention_head", "dropout": "attention_dropout"}
    return {ours: options[name].default for ours, name in names.items()}
