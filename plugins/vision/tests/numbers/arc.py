"""What two layers of ARC's authors return, with gradients, on tensors of sines:
``python -m peftcore.testing.freeze arc.py CHECKOUT``."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "DavidYanAnDe/ARC", "8227d57", "Model/ARC_ViT.py")
VERSIONS = ("torch",)
WIDTH, INNER = 8, 3
SIZES = {"mlp_dim": 16, "num_heads": 2, "num_layers": 2, "attention_drop_rate": 0.0, "mlp_drop_rate": 0.0}
# Parts of a layer, and what they are called in timm, on whose names the numbers depend.
PARTS = {"layer.": "blocks.", "attention.projective": "attn.proj", "mlp.fc": "mlp.fc", "att_layer_norm": "norm1"}
PARTS |= {"fnn_layer_norm": "norm2", "layer_norm": "norm"}


def wave(shape: Sequence[int], key: str) -> Tensor:
    """Sines around 0, of norms' gains around 1."""
    around = 1.0 if "norm" in key and key.endswith("weight") else 0.0
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97
    return around + 0.3 * torch.sin(steps).view(*shape)


def renamed(name: str) -> str:
    for theirs, ours in PARTS.items():
        name = name.replace(theirs, ours)
    return name


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the second picture's tokens, their gradients, and those of all that ARC has, by the authors' names."""
    module = load(checkout / SOURCE.script, root=checkout, absent=["Utils", "Utils.tools"])
    config = SimpleNamespace(hidden_size=WIDTH, transformer=SIZES, adapter_dim=INNER, adapter_dropout=0.0)
    model: Any = module.Transformer(config, "ARC").double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            third = next((i for i, each in enumerate(("query", "key", "value")) if each in name), None)
            if third is None:
                parameter.copy_(wave(parameter.shape, renamed(name)))
            else:  # timm has them in one
                whole = name.replace("layer.", "blocks.").replace("attention.", "attn.")
                whole = whole.replace(("query", "key", "value")[third], "qkv")
                shape = (3 * WIDTH, *parameter.shape[1:])
                parameter.copy_(wave(shape, whole).chunk(3)[third])
    x = (4 * wave((2, 5, WIDTH), "x")).requires_grad_()
    y = model(x)
    (y * wave(y.shape, "direction")).sum().backward()
    assert x.grad is not None
    found = {"y": y[1].tolist(), "x": x.grad[1].tolist()}
    added = ((name, p) for name, p in model.named_parameters() if "adapter" in name or "projection" in name)
    return found | {name: parameter.grad.flatten().tolist() for name, parameter in added}
