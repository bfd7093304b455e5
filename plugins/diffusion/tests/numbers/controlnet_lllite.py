"""What ControlNet-LLLite's own code computes at a linear layer, with its gradients:
``python -m peftcore.testing.freeze controlnet_lllite.py CHECKOUT``.

The repository's other modules, of which this one imports a class and a logger, are not needed and stand empty.
"""

import sys
from pathlib import Path
from runpy import run_path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "kohya-ss/sd-scripts", "48d368f", "networks/control_net_lllite.py")
VERSIONS = ("torch",)
WIDTH, OUT, CONDITION, HIDDEN, SCALE = 6, 5, 4, 3, 0.7
DEPTHS = (1, 2, 3)


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


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns output and gradients by depth."""
    library, utils = ModuleType("library"), ModuleType("library.utils")
    unet = ModuleType("library.sdxl_original_unet")
    unet.SdxlUNet2DConditionModel = nn.Module  # type: ignore[attr-defined]
    utils.setup_logging = lambda: None  # type: ignore[attr-defined]
    library.sdxl_original_unet, library.utils = unet, utils  # type: ignore[attr-defined]
    sys.modules |= {"library": library, "library.utils": utils, "library.sdxl_original_unet": unet}
    theirs = run_path(str(checkout / SOURCE.script), run_name="lllite")
    found = {}
    for depth in DEPTHS:
        layer = nn.Linear(WIDTH, OUT).double()
        filled(layer, 0.0)
        module = theirs["LLLiteModule"](depth, CONDITION, "lllite", layer, HIDDEN, multiplier=SCALE).double()
        filled(module, 13.0)
        module.apply_to()
        module.set_cond_image(image())
        x = tokens(depth).requires_grad_()
        output = layer(x)
        (output * wave(*output.shape, phase=2.0)).sum().backward()
        gradients = {name: parameter.grad.flatten().tolist() for name, parameter in module.named_parameters()}
        found[str(depth)] = {"output": output.flatten().tolist(), "x": x.grad.flatten().tolist(), **gradients}
    return found
