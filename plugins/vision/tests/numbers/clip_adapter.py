"""What the model of CLIP-Adapter's authors makes of features, on tensors of cosines, what it starts from and trains:
``python -m peftcore.testing.freeze clip_adapter.py CHECKOUT``."""

import ast
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from adaptformer import run_statements
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
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


def adapted(checkout: Path) -> Any:
    """Returns their model around stand-ins for both encoders, whose tensors nothing reads."""
    clip = SimpleNamespace(visual=nn.Linear(2, 3), logit_scale=nn.Parameter(torch.zeros(())), dtype=torch.float32)
    return load(checkout / SOURCE.script, absent=ABSENT).CustomCLIP(None, [], clip)


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the matrices of 1,024 features start from."""
    model = adapted(checkout)
    return {"down.weight": drawn(model.adapter.fc[0].weight), "up.weight": drawn(model.adapter.fc[2].weight)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what their trainer leaves to train, of 1,024 features."""
    model = adapted(checkout)
    run_statements(checkout / SOURCE.script, ast.For, "requires_grad_(False)", self=SimpleNamespace(model=model))
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns how many times narrower their bottleneck is, and the share of an adapter that turns features round."""
    model = adapted(checkout)
    told = {"reduction": model.adapter.fc[0].in_features // model.adapter.fc[0].out_features}
    turned = SimpleNamespace(image_encoder=nn.Identity(), dtype=torch.float32, logit_scale=torch.zeros(1))
    turned.adapter, turned.text_encoder = lambda f: f.flip(-1), lambda: torch.eye(2)
    first, second = type(model).forward(turned, torch.tensor([[1.0, 0.0]]))[0].tolist()
    return told | {"ratio": round(second / (first + second), 6)}
