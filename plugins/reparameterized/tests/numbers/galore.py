"""What the AdamW of GaLore's authors makes of three matrices in eight steps, on tensors that look random:
``python -m peftcore.testing.freeze galore.py CHECKOUT``. (At this commit it is `galore_torch` 1.0.)

Both sides at once are left out: off the diagonal that gradient is zero but for rounding, which Adam blows up to full
steps.
"""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "jiaweizzhao/GaLore", "33f2c4f", "galore_torch/adamw.py")
VERSIONS = ("torch", "transformers")
SHAPES = ((20, 12), (9, 20), (9, 9))


def wave(shape: tuple[int, ...], seed: int) -> Tensor:
    steps = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(steps**1.5 * (0.37 + 0.11 * seed)).view(shape).float()


def numbers(checkout: Path) -> dict[str, list[list[float]]]:
    """Returns every fifth entry of the three weights, by the side that is projected."""
    sys.path.insert(0, str(checkout))
    from galore_torch.adamw import AdamW

    found = {}
    for side in ("std", "reverse_std", "left", "right"):
        weights = [torch.nn.Parameter(wave(shape, 10 + index)) for index, shape in enumerate(SHAPES)]
        group = {"params": weights, "rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": side}
        optimizer = AdamW([group], lr=0.05, eps=1e-12, weight_decay=0.1, no_deprecation_warning=True)
        for step in range(8):
            for index, weight in enumerate(weights):
                weight.grad = wave(SHAPES[index], step + index)
            optimizer.step()
        found[side] = [[round(each, 7) for each in weight.flatten()[::5].tolist()] for weight in weights]
    return found
