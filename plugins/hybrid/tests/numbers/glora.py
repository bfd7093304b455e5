"""What the layer of GLoRA's authors gives, with and without a bias of its own, on tensors of sines:
``python -m peftcore.testing.freeze glora.py CHECKOUT``."""

from pathlib import Path

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
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
