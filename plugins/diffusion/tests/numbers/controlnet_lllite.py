"""What ControlNet-LLLite's own code computes at a linear layer, with its gradients, what it starts from, how much it
trains in SDXL, and its options: ``python -m peftcore.testing.freeze controlnet_lllite.py CHECKOUT``."""

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "kohya-ss/sd-scripts", "48d368f", "networks/control_net_lllite.py")
VERSIONS = ("torch",)
WIDTH, OUT, CONDITION, HIDDEN, SCALE = 6, 5, 4, 3, 0.7
DEPTHS = (1, 2, 3)
LAYERS, WIDE = 200, 64
"""Layers and widths where starts are drawn: of a single layer the biases are too few numbers to compare."""
NAMES = {"down": "down.0", "mid": "mid.0", "up": "up.0"}
NAMES |= {f"convolutions.{number}": f"conditioning1.{2 * number}" for number in range(3)}
"""Our names of layers, and theirs."""


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers that everybody can make again."""
    numbers = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(numbers**1.5 + phase).view(shape)


def image() -> Tensor:
    """Two pictures, 8 times as large as latents of 4 x 4."""
    return wave(2, 3, 32, 32)


def tokens(depth: int) -> Tensor:
    """What the layer is given where the latents were halved `depth` - 1 times."""
    return wave(2, (8 // 2**depth) ** 2, WIDTH, phase=1.0)


@torch.no_grad()
def filled(module: nn.Module, start: float) -> None:
    """Fill all tensors with waves of 0.3."""
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(0.3 * wave(*parameter.shape, phase=start + number))


def theirs(checkout: Path) -> Any:
    return load(checkout / SOURCE.script, checkout, absent=["library.utils"])


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns output and gradients by depth."""
    found, authors = {}, theirs(checkout)
    for depth in DEPTHS:
        layer = nn.Linear(WIDTH, OUT).double()
        filled(layer, 0.0)
        module = authors.LLLiteModule(depth, CONDITION, "lllite", layer, HIDDEN, multiplier=SCALE).double()
        filled(module, 13.0)
        module.apply_to()
        module.set_cond_image(image())
        x = tokens(depth).requires_grad_()
        output = layer(x)
        (output * wave(*output.shape, phase=2.0)).sum().backward()
        gradients = {name: parameter.grad.flatten().tolist() for name, parameter in module.named_parameters()}
        found[str(depth)] = {"output": output.flatten().tolist(), "x": x.grad.flatten().tolist(), **gradients}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns by our names what tensors of the deepest networks, those of all layers together, are drawn from."""
    network = theirs(checkout).LLLiteModule
    modules = [network(3, WIDE, "lllite", nn.Linear(WIDE, 1), WIDE) for _ in range(LAYERS)]
    tensors = [(f"{ours}.{kind}", f"{layer}.{kind}") for ours, layer in NAMES.items() for kind in ("weight", "bias")]
    return {ours: drawn(torch.cat([each.get_parameter(name).flatten() for each in modules])) for ours, name in tensors}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train in SDXL at its real size, by the layer of its UNet."""
    authors = theirs(checkout)
    with torch.device("meta"):
        network = authors.ControlNetLLLite(authors.sdxl_original_unet.SdxlUNet2DConditionModel())
    network.apply_to()
    network.prepare_grad_etc()
    return {
        module.lllite_name: sum(each.numel() for each in module.parameters() if each.requires_grad)
        for module in network.unet_modules
    }


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of the class, and the channels of the image that their convolutions take."""
    authors = theirs(checkout)
    told = {name: each.default for name, each in signature(authors.ControlNetLLLite).parameters.items()}
    network = authors.LLLiteModule(1, told["cond_emb_dim"], "lllite", nn.Linear(2, 2), told["mlp_dim"])
    return {
        "condition_dim": told["cond_emb_dim"],
        "hidden": told["mlp_dim"],
        "dropout": told["dropout"] or 0.0,  # None drops nothing
        "scale": told["multiplier"],
        "channels": network.conditioning1[0].in_channels,
    }
