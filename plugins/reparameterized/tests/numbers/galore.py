"""Where eight steps of GaLore's own AdamW bring three matrices, on tensors that look random:
``python -m peftcore.testing.freeze galore.py CHECKOUT``."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "jiaweizzhao/GaLore", "2cc66f8", "galore_torch/adamw.py")
VERSIONS = ("torch", "transformers")
ABSENT = ("tensorly", "tensorly.decomposition")
SHAPES = ((20, 12), (9, 20), (9, 9))


def wave(shape: tuple[int, ...], seed: int) -> Tensor:
    steps = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(steps**1.5 * (0.37 + 0.11 * seed)).view(shape).float()


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the sum of each matrix times cosines, by the side that is projected. Both sides at once are left out: off
    the diagonal that gradient is zero but for rounding, which Adam blows up to full steps."""
    module, found = load(checkout / SOURCE.script, root=checkout, absent=ABSENT), {}
    for side in ("std", "reverse_std", "left", "right"):
        values = [nn.Parameter(wave(shape, 10 + index)) for index, shape in enumerate(SHAPES)]
        group = {"params": values, "rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": side}
        optimizer = module.AdamW([group], lr=0.05, eps=1e-12, weight_decay=0.1, no_deprecation_warning=True)
        for step in range(8):
            for index, value in enumerate(values):
                value.grad = wave(SHAPES[index], step + index)
            optimizer.step()
        cosines = [torch.cos(torch.arange(value.numel()) * 1.0).view(value.shape).double() for value in values]
        found[side] = [(value.double() * c).sum().item() for value, c in zip(values, cosines, strict=True)]
    return found
