"""What T-LoRA's authors' own layers compute at several timesteps, and their gradients:
``python -m peftcore.testing.freeze tlora.py CHECKOUT``.
"""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "ControlGenAI/T-LoRA", "602c4f7", "tlora/model/lora.py")
VERSIONS = ("torch",)
INPUTS, OUTPUTS, RANK, MIN_RANK = 7, 6, 5, 2
KINDS = ("ortho_lora", "lortho_lora", "lora")
TIMESTEPS = {0: 1.0, 200: 2.0, 500: 1.0, 999: 1.0}
"""And the exponent of the rank at each."""


def wave(*shape: int) -> Tensor:
    """Numbers that everybody can make again."""
    return torch.sin(torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) ** 1.5).view(shape)


def tensors() -> dict[str, Tensor]:
    """Returns the factors and singular values, those that they started from, and an input."""
    shapes = {
        "A": (RANK, INPUTS), "B": (OUTPUTS, RANK), "values": (RANK,),
        "A0": (RANK, INPUTS), "B0": (OUTPUTS, RANK), "values0": (RANK,), "x": (2, 3, INPUTS),
    }  # fmt: skip
    return {name: wave(*shape) / (index + 1) for index, (name, shape) in enumerate(shapes.items())}


def layer_of(layers: Any, kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns a layer of theirs with these tensors in it, and what trains by our names."""
    given = tensors()
    if kind == "lora":
        layer = layers[kind](INPUTS, OUTPUTS, RANK).double()
        held = {"A": layer.down.weight, "B": layer.up.weight}
    else:
        base = [nn.Linear(INPUTS, OUTPUTS)] if kind == "lortho_lora" else []
        layer = layers[kind](*base, INPUTS, OUTPUTS, RANK).double()
        held = {"A": layer.q_layer.weight, "B": layer.p_layer.weight, "values": layer.lambda_layer}
        held |= {"A0": layer.base_q.weight, "B0": layer.base_p.weight, "values0": layer.base_lambda}
    with torch.no_grad():
        for name, own in held.items():
            own.copy_(given[name].view(own.shape))
    return layer, {name: own for name, own in held.items() if own.requires_grad}


def function(file: Path, name: str) -> Any:
    """Returns one function of a file that wants an older transformers."""
    every = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    (found,) = (node for node in every if isinstance(node, ast.FunctionDef) and node.name == name)
    space: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([found], []), str(file), "exec"), space)
    return space[name]


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns the update and gradients of each kind at each timestep."""
    sys.path.insert(0, str(checkout))
    from tlora.model.lora import lora_linear_layers

    mask_of = function(checkout / "tlora/model/pipeline_sdxl.py", "get_mask_by_timestep")
    found = {}
    for kind in KINDS:
        for timestep, power in TIMESTEPS.items():
            mask = mask_of(SimpleNamespace(max_rank=RANK), timestep, 1000, RANK, MIN_RANK, power)
            layer, held = layer_of(lora_linear_layers.classes, kind)
            x = tensors()["x"].requires_grad_()
            output = layer(x, mask.double())
            (output * wave(*output.shape)).sum().backward()
            grads = {name: own.grad.tolist() for name, own in held.items()}
            found[f"{kind} {timestep}"] = {"output": output.tolist(), "x": x.grad.tolist(), **grads}
    return found
