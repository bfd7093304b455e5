"""The codes of Bi-AdaptFormer's authors, and what their adapter adds to tokens, on tensors of sines:
``python -m peftcore.testing.freeze bi_adaptformer.py CHECKOUT``."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "JieShibo/PETL-ViT", "026e4f1", "binary_adapter/adaptformer.py")
VERSIONS = ("torch", "scipy")


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the codes by bits; then, by bits, what is added to two tokens of width 6, ``[2, 6]``, and the gradients
    of both matrices."""
    module = load(checkout / SOURCE.script, absent=("vtab",))
    codes = {str(bits): module.QLinear(6, 4, bits).code.tolist() for bits in (1, 2, 4)}
    found = {}
    for bits in (1, 2):
        adapter = module.Adapter(4, bits)
        adapter.adapter_down, adapter.adapter_up = module.QLinear(6, 4, bits), module.QLinear(4, 6, bits)
        adapter.double().eval()
        down, up = adapter.adapter_down.weight, adapter.adapter_up.weight
        with torch.no_grad():
            down.copy_(wave(4, 6, step=1.1))
            up.copy_(wave(6, 4, step=0.7))
        added = adapter(5 * wave(1, 2, 6, step=2.1))
        (added * wave(1, 2, 6, step=2.9)).sum().backward()
        found[str(bits)] = {"added": added[0].tolist(), "up": up.grad.tolist(), "down": down.grad.tolist()}
    return {"codes": codes, "adapter": found}
