"""What the bypass of Convpass' authors makes of tokens, on tensors of sines, what it starts from and trains:
``python -m peftcore.testing.freeze convpass.py CHECKOUT``."""

import ast
import inspect
import math
from pathlib import Path
from typing import Any

import timm
import torch
from adaptformer import run_statements
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "JieShibo/PETL-ViT", "026e4f1", "convpass/vtab/convpass.py")
VERSIONS = ("torch", "timm")
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


def start(checkout: Path) -> dict[str, Any]:
    """Returns what a bypass of 80 channels starts from with Xavier's draw, and the convolution of one of 8 without."""
    module = load(checkout / SOURCE.script)
    found = module.Convpass(80, xavier_init=True).named_parameters()
    drawn_ones = {name.removeprefix("adapter_"): drawn(parameter) for name, parameter in found}
    return drawn_ones | {"identity": module.Convpass(8).adapter_conv.weight.tolist()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what trains of a vision transformer of two blocks, 768 wide as it has to be."""
    module = load(checkout / SOURCE.script)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 768, "depth": 2, "num_heads": 2, "num_classes": 5}
    model, trainable = timm.models.vision_transformer.VisionTransformer(**sizes), list[Any]()
    module.set_Convpass(model, "convpass")
    file = checkout / "convpass/vtab/train.py"
    run_statements(file, ast.For, "requires_grad = False", model=model, trainable=trainable)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: parameter.numel() for parameter in trainable}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of the function that puts bypasses into a model, and their dropout."""
    module = load(checkout / SOURCE.script)
    told = {name: each.default for name, each in inspect.signature(module.set_Convpass).parameters.items()}
    start = "xavier" if told["xavier_init"] else "identity"
    return {"bottleneck": told["dim"], "scale": told["s"], "conv_init": start, "dropout": module.Convpass().dropout.p}
