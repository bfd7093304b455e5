"""What the authors' Consolidator returns, with gradients, and what it merges into, on tensors of sines:
``python -m peftcore.testing.freeze consolidator.py CHECKOUT``."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "THU-MIG/Consolidator", "545d006", "model/vision_transformer_timm.py")
VERSIONS = ("torch", "timm")
ABSENT = ("timm.models.helpers", "timm.models.registry", "timm.models.layers.helpers")
INPUTS, OUTPUTS = 12, 24
CASES = {"one": ((4,), False), "dealt": ((4,), True), "several": ((6, 3), True)}


def wave(shape: Sequence[int], key: str) -> Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97
    return 0.3 * torch.sin(steps).view(*shape)


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns by case the output of a row of three tokens, gradients, and the merged weight and bias."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    torch.set_default_dtype(torch.float64)  # of what is merged
    found: dict[str, Any] = {}
    for case, (groups, dealt) in CASES.items():
        layer: Any = module.Consolidator(INPUTS, OUTPUTS, fc_groups=groups, with_channel_shuffle=dealt).eval()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(wave(parameter.shape, name))
        x = (4 * wave((1, 3, INPUTS), "x")).requires_grad_()
        y = layer(x)
        (y * wave(y.shape, "direction")).sum().backward()
        assert x.grad is not None
        weight, bias = layer.get_actual_params()
        parts = {
            "y": y,
            "x": x.grad,
            "weight": weight[:4],
            "bias": bias,
            "G": layer.fc_rep_branches[-1].group_fc.weight.grad,
        }
        found[case] = {name: part.flatten().tolist() for name, part in parts.items()}
    torch.set_default_dtype(torch.float32)
    return found
