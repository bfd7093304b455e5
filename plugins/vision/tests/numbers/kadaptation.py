"""What KAdaptation's authors add to queries and values, with gradients, on tensors of sines:
``python -m peftcore.testing.freeze kadaptation.py CHECKOUT``."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "eric-ai-lab/PEViT", "be6fb43", "vision_benchmark/evaluation/model.py")
VERSIONS = ("torch",)
WIDTH = 64


def wave(shape: Sequence[int], key: str) -> Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97
    return 0.3 * torch.sin(steps).view(*shape)


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns what is added to eight features of two tokens, and gradients of tokens and of all tensors in part."""
    module = load(checkout / SOURCE.script)
    transformer: Any = module.Transformer(WIDTH, 1, 2, kattention=True).double().eval()
    attention = transformer.resblocks[0].attn
    tensors = {name: p for name, p in attention.named_parameters() if "adapter" in name or name == "b"}
    tensors |= {name: p for name, p in transformer.named_parameters() if name.startswith("phm_rule")}
    with torch.no_grad():
        for name, parameter in tensors.items():
            parameter.copy_(wave(parameter.shape, name))
    found: dict[str, Any] = {}
    for which in ("q", "v"):
        x = wave((2, 1, WIDTH), "x").requires_grad_()
        added = attention.adapter_forward(x, matrix=which)
        transformer.zero_grad()
        (added * wave(added.shape, "direction")).sum().backward()
        assert x.grad is not None
        parts = {"added": added[:, 0, :8], "x": x.grad[:, 0, :8]}
        number = "12"[which == "v"]
        # of values too the code takes the matrices u v of queries
        own = {name: p for name, p in tensors.items() if name.startswith(("q_proj", f"phm_rule{number}"))}
        parts |= {name: p.grad.flatten()[:6] for name, p in own.items()}
        found[which] = {name: part.flatten().tolist() for name, part in parts.items()}
    return found
