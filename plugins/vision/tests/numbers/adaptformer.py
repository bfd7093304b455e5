"""What the adapter of AdaptFormer's authors adds to tokens, on tensors of sines:
``python -m peftcore.testing.freeze adaptformer.py CHECKOUT``."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "ShoufaChen/AdaptFormer", "6967d67", "models/adapter.py")
VERSIONS = ("torch",)
STEPS = {"down_proj.weight": 1.1, "down_proj.bias": 1.3, "up_proj.weight": 1.7, "up_proj.bias": 1.9}
STEPS |= {"adapter_layer_norm_before.weight": 2.3, "adapter_layer_norm_before.bias": 2.9}


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, list[list[float]]]:
    """Returns what is added to two tokens of width 6, ``[2, 6]``, by the place of the norm."""
    spec = importlib.util.spec_from_file_location("authors", checkout / SOURCE.script)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {}
    for place in ("none", "in", "out"):
        adapter = module.Adapter(
            d_model=6, bottleneck=4, init_option="lora", adapter_scalar="0.1", adapter_layernorm_option=place
        ).double()
        for name, parameter in adapter.named_parameters():
            parameter.copy_(wave(*parameter.shape, step=STEPS[name]) + (name == "adapter_layer_norm_before.weight"))
        found[place] = adapter(5 * wave(1, 2, 6, step=2.1), add_residual=False)[0].tolist()
    return found
