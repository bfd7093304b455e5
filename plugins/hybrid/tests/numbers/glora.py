"""What the layer of GLoRA's authors gives, with and without a bias of its own, on tensors of sines; what it starts
from, what trains of a model, and their options: ``python -m peftcore.testing.freeze glora.py CHECKOUT``."""

import ast
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "Arnav0400/ViT-Slim", "0fed674", "GLoRA/layer.py")
VERSIONS = ("torch",)


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns the outputs, ``[2, 4]`` flat, and the gradient of E, by whether there is a bias."""
    module, found = load(checkout / SOURCE.script), {}
    tensors = {"weight": wave((4, 6), 0.9), "Ad": wave((4, 2), 0.3), "Au": wave((2, 6), 0.5), "Bd": wave((4, 2), 0.7)}
    tensors |= {"Cd": wave((6, 2), 0.9), "Cu": wave((2, 1), 1.1), "D": wave((1,), 1.3), "E": wave((4,), 1.5)}
    tensors["bias"] = wave((4,), 0.8)
    for bias in (True, False):
        layer = module.ModuleInjection.make_scalable(nn.Linear(6, 4, bias=bias), rank=2).double()
        layer.eval_config = {"A": "LoRA_2", "B": "vector", "C": "LoRA_2", "D": "constant", "E": "vector"}
        with torch.no_grad():
            for name, value in tensors.items():
                if getattr(layer, name) is not None:
                    getattr(layer, name).copy_(value)
        y = layer(wave((2, 6), 0.5))
        y.square().sum().backward()
        found[str(bias)] = {"outputs": y.flatten().tolist(), "E": layer.E.grad.tolist()}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of a layer of 300 features are drawn from, at rank 200."""
    layer = load(checkout / SOURCE.script).ModuleInjection.make_scalable(nn.Linear(300, 300), rank=200)
    names = {"A": "Ad", "A_up": "Au", "B": "Bd", "B_up": "Bu", "C": "Cd", "D": "D", "E": "E"}
    found = {ours: drawn(layer.get_parameter(theirs)) for ours, theirs in names.items()}
    column = load(checkout / SOURCE.script).ModuleInjection.make_scalable(nn.Linear(2, 2), rank=40000).Cu
    return {**found, "C_up": drawn(column)}


def trains(checkout: Path) -> dict[str, list[int]]:
    """Returns the shapes of what trains of a model with a layer, its norm and its head, after the lines of their script
    that freeze all else: D and E are as long as the output, of which a constant reads the first number alone."""
    model = nn.Sequential()
    for name, layer in {"qkv": nn.Linear(6, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 3)}.items():
        model.add_module(name, layer)
    load(checkout / "GLoRA/utils.py").set_glora(model, 2)
    script = ast.parse((checkout / "GLoRA/supernet.py").read_text())
    lines: list[Any] = [node for node in ast.walk(script) if isinstance(node, ast.For)]
    exec(compile(ast.Module(lines, []), "supernet.py", "exec"), {"vit": model, "trainable": []})
    return {name: [*each.shape] for name, each in model.named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the rank of their function."""
    make = load(checkout / SOURCE.script).ModuleInjection.make_scalable
    return {"rank": inspect.signature(make).parameters["rank"].default}
