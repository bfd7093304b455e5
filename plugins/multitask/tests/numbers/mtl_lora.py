"""What the layer of MTL-LoRA's authors gives for rows of two tasks, on tensors of sines:
``python -m peftcore.testing.freeze mtl_lora.py CHECKOUT``."""

import math
from pathlib import Path

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "pUmpKin-Co/MTL-LoRA", "7848a70", "src/adapter/mlora.py")
VERSIONS = ("torch",)
ABSENT = ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.zero.partition_parameters")


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns the output, and the gradients of both factors, of the tasks' matrices and logits and of the input, all
    flat: with whole matrices and with diagonals. In training, half of the input dropped, torch's generator at 0. The
    softmax is in float32."""
    module = load(checkout / SOURCE.script, root=checkout / "src", absent=ABSENT)
    found = {}
    for kind, shape in {"full": (4, 2, 2), "diagonal": (4, 2)}.items():
        layer = module.mLoRALinear(
            5, 4, 3, 4, kind == "diagonal", B_scale=0.5, r=2, lora_alpha=3, lora_dropout=0.5
        ).double()
        with torch.no_grad():
            layer.weight.copy_(wave(4, 5, step=1.1))
            layer.bias.copy_(wave(4, step=1.3))
            layer.lora_A.copy_(wave(1, 2, 5, step=1.7))
            layer.lora_B.copy_(wave(3, 4, 2, step=2.3))
            layer.lora_lambdas.copy_(wave(*shape, step=0.7))
            layer.lora_B_w.copy_(wave(4, 3, step=1.9))
        x = wave(2, 3, 5, step=0.9).requires_grad_()
        torch.manual_seed(0)
        y = layer(x, torch.tensor([2, 0]))
        (y * wave(2, 3, 4, step=0.3)).sum().backward()
        parts = {"y": y, "A": layer.lora_A.grad, "B": layer.lora_B.grad, "middle": layer.lora_lambdas.grad}
        parts |= {"logits": layer.lora_B_w.grad, "x": x.grad}
        found[kind] = {name: tensor.flatten().tolist() for name, tensor in parts.items()}
    return found
