"""The codes of Bi-AdaptFormer's authors, what their adapter adds to tokens, on tensors of sines, what it starts from,
and what their script trains with which options:
``python -m peftcore.testing.freeze bi_adaptformer.py CHECKOUT``."""

import math
import textwrap
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "JieShibo/PETL-ViT", "026e4f1", "binary_adapter/adaptformer.py")
VERSIONS = ("torch", "scipy", "timm")
VIT: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 768, "depth": 2, "num_heads": 2, "num_classes": 3}


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


def start(checkout: Path) -> dict[str, Any]:
    """Returns what an adapter of the width 64 starts from, beside 768 numbers."""
    adapter = load(checkout / SOURCE.script, absent=("vtab",)).Adapter(64, 1)
    return {"down": drawn(adapter.adapter_down.weight), "up": drawn(adapter.adapter_up.weight)}


def run(checkout: Path, first: str, last: str, space: dict[str, Any]) -> dict[str, Any]:
    """Runs the lines of their main.py from one on until another."""
    text = (checkout / "binary_adapter" / "main.py").read_text(encoding="utf-8")
    lines = text[text.rindex("\n", 0, text.index(first)) + 1 : text.index(last)]
    exec(compile(textwrap.dedent(lines), "main.py", "exec"), space)
    return space


def trains(checkout: Path) -> dict[str, int]:
    """Returns what the lines of their script leave to train of an image transformer of two blocks, by name: how many
    numbers."""
    model = timm.models.VisionTransformer(**VIT)
    load(checkout / SOURCE.script, absent=("vtab",)).set_adapter(model, dim=5)
    run(checkout, "trainable = []", "        opt = AdamW", {"vit": model})
    return {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of their script, and the dropout of the adapter."""
    space = run(checkout, "parser = ArgumentParser()", "    args = parser", {"ArgumentParser": ArgumentParser})
    told = space["parser"].parse_args([])
    adapter = load(checkout / SOURCE.script, absent=("vtab",)).Adapter(told.dim, told.bit)
    return {"bottleneck": told.dim, "bits": told.bit, "scale": told.scale, "dropout": adapter.dropout.p}
