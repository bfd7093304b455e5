"""What FacT-TK's authors add to an attention and to a feed-forward of width 6, on tensors of sines:
``python -m peftcore.testing.freeze fact_tk.py CHECKOUT``."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "JieShibo/PETL-ViT", "026e4f1", "FacT/fact_tk.py")
VERSIONS = ("torch",)
ABSENT = ("avalanche.evaluation.metrics.accuracy", "vtab")


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


def linear(*shape: int, step: float) -> Callable[[Tensor], Tensor]:
    return partial(nn.functional.linear, weight=wave(*shape, step=step))


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns what is added to queries, keys and values of a token, to the output of an attention that reads those
    values, and by both matrices of a feed-forward: the layers themselves give zeros, into which the authors add."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    module.vit = SimpleNamespace(FacTu=linear(3, 6, step=1.1), FacTv=linear(6, 3, step=1.3))
    module.vit.FacTc, module.vit.FacTp = wave(3, 3, 3, step=2.3), wave(3, 12, step=2.9)
    qkv, up, same = torch.zeros(1, 1, 18).double(), torch.zeros(1, 1, 24).double(), nn.Identity()
    layer = SimpleNamespace(s=50.0, dim=3, dp=same, num_heads=1, scale=1.0, attn_drop=same, proj_drop=same, drop=same)
    layer.qkv, layer.fc1 = lambda x: qkv, lambda x: up
    layer.proj = layer.fc2 = lambda x: torch.zeros(1, 1, 6).double()
    layer.act = lambda x: 5 * wave(1, 1, 24, step=2.1)  # what the second matrix reads
    layer.idx = 0
    output = module.fact_forward_attn(layer, 5 * wave(1, 1, 6, step=2.1))
    layer.idx = 4
    down = module.fact_forward_mlp(layer, 5 * wave(1, 1, 6, step=2.1))
    q, k, v = qkv.flatten().chunk(3)
    found = {"q": q, "k": k, "v": v, "out": output, "up": up, "down": down}
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}
