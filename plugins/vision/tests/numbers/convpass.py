"""What the bypass of Convpass' authors makes of tokens, on tensors of sines:
``python -m peftcore.testing.freeze convpass.py CHECKOUT``."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "JieShibo/PETL-ViT", "026e4f1", "convpass/vtab/convpass.py")
VERSIONS = ("torch",)
STEPS = {"down.weight": 1.1, "down.bias": 1.3, "up.weight": 1.7, "up.bias": 1.9, "conv.weight": 2.3, "conv.bias": 2.9}


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


@torch.no_grad()
def made(bypass: Any, channels: int, shape: tuple[int, ...]) -> Tensor:
    """Returns what it makes of the last image, times 3."""
    bypass.adapter_down, bypass.adapter_up = nn.Linear(6, channels), nn.Linear(channels, 6)  # 768 wide in the code
    for name, parameter in bypass.double().eval().named_parameters():
        parameter.copy_(wave(*parameter.shape, step=STEPS[name.removeprefix("adapter_")]))
    result: Tensor = 3.0 * bypass(5 * wave(*shape, step=2.1))[-1]
    return result


def numbers(checkout: Path) -> dict[str, list[list[float]]]:
    """Returns the first four features of tokens of a ViT, and of places of a Swin transformer's grid."""
    module = load(checkout / SOURCE.script)
    vit = made(module.Convpass(8), 8, (1, 197, 6))[[0, 1, 14, 100, 196], :4]
    swin = made(module.Convpass_swin(4, vit_dim=6), 4, (2, 9, 6))[[0, 4, 8], :4]
    return {"vit": vit.tolist(), "swin": swin.tolist()}
