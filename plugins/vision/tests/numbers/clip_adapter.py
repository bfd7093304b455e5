"""What the model of CLIP-Adapter's authors makes of features, on tensors of cosines:
``python -m peftcore.testing.freeze clip_adapter.py CHECKOUT``."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "gaopengcuhk/CLIP-Adapter", "08d07f8", "clip_adapter.py")
VERSIONS = ("torch",)
ABSENT = ("dassl.engine", "dassl.metrics", "dassl.utils", "dassl.optim", "clip", "clip.simple_tokenizer")


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the cosines of three images' features with eight unit vectors, ``[3, 8]``, and the gradients of both
    matrices."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    same = nn.Identity()
    model = SimpleNamespace(image_encoder=same, dtype=torch.float64, logit_scale=torch.zeros(1).double())
    model.adapter, model.text_encoder = module.Adapter(8, 4).double(), lambda: torch.eye(8).double()
    down, up = model.adapter.fc[0].weight, model.adapter.fc[2].weight
    with torch.no_grad():
        down.copy_(wave((2, 8), "down"))
        up.copy_(wave((8, 2), "up"))
    logits = module.CustomCLIP.forward(model, wave((3, 8), "features"))
    (logits * wave((3, 8), "direction")).sum().backward()
    return {"logits": logits.tolist(), "down": down.grad.tolist(), "up": up.grad.tolist()}
