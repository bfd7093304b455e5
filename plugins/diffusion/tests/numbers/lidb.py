"""What a layer of Lightweight DreamBooth computes in a code whose authors are not the paper's, and the LoRA that it
makes of itself, in float64, what trains and the input waves: ``python -m peftcore.testing.freeze lidb.py CHECKOUT``."""

import ast
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "MFaceTech/HyperDreamBooth", "25a4312", "modules/light_lora.py")
VERSIONS = ("torch",)
INPUTS, OUTPUTS, A, B, ALPHA = 9, 7, 5, 4, 3.0
RANKS = (1, 2)


def wave(k: float, *shape: int) -> Tensor:
    """Numbers that everybody can make again."""
    return 0.3 * torch.sin(torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) * k + k).view(shape)


def tensors(rank: int) -> dict[str, Tensor]:
    """Returns what trains, an input, and a direction of the output."""
    return {
        "A": wave(1.3, rank, A),
        "B": wave(0.7, B, rank),
        "x": wave(2.1, 2, 3, INPUTS),
        "direction": wave(0.9, 2, 3, OUTPUTS),
    }


def layer_class(file: Path) -> Any:
    """Returns the first class of that name in a file that wants an older diffusers, which the layer does not need."""
    every = ast.parse(file.read_text(encoding="utf-8")).body
    found = next(node for node in every if isinstance(node, ast.ClassDef) and node.name == "LoRALinearLayer")
    space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "Optional": Optional, "Union": Union}
    exec(compile(ast.Module([found], []), str(file), "exec"), space)
    return space["LoRALinearLayer"]


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns, for each rank, the bases, the update, its gradients, and the factors of the LoRA."""
    make, found = layer_class(checkout / "modules/light_lora.py"), {}
    for rank in RANKS:
        torch.manual_seed(rank)  # from which it draws the seed of its bases
        layer = make(INPUTS, OUTPUTS, rank, A, B, network_alpha=ALPHA, is_train=True).double()
        given = tensors(rank)
        bases = {"A_aux": layer.down_aux.tolist(), "B_aux": layer.up_aux.tolist()}
        layer.weight_embedding.data = torch.cat([given["A"].flatten(), given["B"].flatten()])
        x = given["x"].requires_grad_()
        output = layer(x)
        (output * given["direction"]).sum().backward()
        of_A, of_B = layer.weight_embedding.grad.split([rank * A, B * rank])
        gradients = {"grad_x": x.grad.tolist(), "grad_A": of_A.tolist(), "grad_B": of_B.tolist()}
        layer.convert_to_standard_lora()
        lora = {"down": layer.down.weight.tolist(), "up": layer.up.weight.tolist()}
        found[str(rank)] = {**bases, "output": output.tolist(), **gradients, **lora}
    return found
