"""What a Swin block of Mona's authors returns, with its gradients, on tensors of sines, how their adapters start, what
trains, and their sizes: ``python -m peftcore.testing.freeze mona.py CHECKOUT``."""

import importlib.util
import math
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn

SOURCE = Source(
    "authors",
    "Leiyi-Hu/mona",
    "5deeac9",
    "Swin-Transformer-Classification/mmcls/models/backbones/swin_transformer_mona.py",
)
VERSIONS = ("torch", "timm")
# Parts of an adapter, and what they are called here, on whose names the numbers depend.
PARTS = {"my_module_1": "attention", "my_module_2": "feed_forward", "gammax": "delta", "adapter_conv.projector": "mix"}
PARTS |= {"project1": "down", "project2": "up"}
PARTS |= {f"adapter_conv.conv{i + 1}": f"filters.{i}" for i in range(3)}
WIDTH, SIDE = 8, 4
CHANNELS = 5000  # of the adapters whose start is told: enough numbers in each tensor


def wave(shape: Sequence[int], key: str) -> Tensor:
    """Sines around 0, of norms' gains around 1."""
    around = 1.0 if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma", "delta")) else 0.0
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97
    return around + 0.3 * torch.sin(steps).view(*shape)


def renamed(name: str) -> str:
    for theirs, ours in PARTS.items():
        name = name.replace(theirs, ours)
    return name


def imported(file: Path) -> Any:
    """The module of the file, without the packages around it: their library is for training."""
    for name in ("mmcv_custom", "mmcls", "mmcls.utils", "authors", "authors.backbones", "authors.builder"):
        sys.modules[name] = MagicMock()
    sys.modules["authors.builder"].BACKBONES.register_module.return_value = lambda model: model
    sys.modules["mmcv"] = sys.modules["mmcv.runner"] = SimpleNamespace(BaseModule=nn.Module)  # type: ignore[assignment]
    spec = importlib.util.spec_from_file_location("authors.backbones.mona", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(module: Any, width: int) -> Any:
    """Returns a Swin of one block, as their constructor and their reset make it."""
    sizes = {"embed_dim": width, "depths": [1], "num_heads": [2], "window_size": 2, "out_indices": (0,)}
    model: Any = module.SwinTransformer_mona(**sizes)
    model.init_weights()
    return model


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of the first adapter of their model start from, with more channels than their 64."""
    module = imported(checkout / SOURCE.script)
    convolutions, adapter = module.MonaOp, module.Mona.__init__

    def wider(self: Any, width: int, factor: int) -> None:
        adapter(self, width, factor)
        self.project1, self.project2 = nn.Linear(width, CHANNELS), nn.Linear(CHANNELS, width)

    module.MonaOp, module.Mona.__init__ = lambda channels: convolutions(CHANNELS), wider
    found = model_of(module, WIDTH).layers[0].blocks[0].named_parameters()
    return {renamed(name): drawn(each) for name, each in found if name.startswith("my_module_1")}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of the tensors that train, of a Swin of one block."""
    model = model_of(imported(checkout / SOURCE.script), WIDTH)
    found = ((renamed(name), each.numel()) for name, each in model.named_parameters() if each.requires_grad)
    return {name.removeprefix("layers.0.blocks.0."): size for name, size in found}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the sizes and dropout of the adapters of a block, and where these are."""
    block = model_of(imported(checkout / SOURCE.script), WIDTH).layers[0].blocks[0]
    adapters = {renamed(name): each for name, each in block.named_children() if name.startswith("my_module")}
    (channels,) = {each.project1.out_features for each in adapters.values()}
    (dropout,) = {each.dropout.p for each in adapters.values()}
    behind = "both" if adapters.keys() == {"attention", "feed_forward"} else [*adapters]
    return {"bottleneck": channels, "dropout": dropout, "behind": behind}


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns four tokens of the second picture, their gradients, and those of the first four of each tensor of the
    adapters."""
    module = imported(checkout / SOURCE.script)
    block: Any = module.SwinTransformerBlock(WIDTH, num_heads=2, window_size=2, shift_size=0).double().eval()
    block.H = block.W = SIDE
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(wave(parameter.shape, renamed(name)))
    x = (4 * wave((2, SIDE * SIDE, WIDTH), "x")).requires_grad_()
    y = block(x, None)
    (y * wave(y.shape, "direction")).sum().backward()
    assert x.grad is not None
    found: dict[str, Any] = {"y": y[1, ::5].tolist(), "x": x.grad[1, ::5].tolist()}
    for name, parameter in block.named_parameters():
        if name.startswith("my_module"):
            found[renamed(name)] = parameter.grad.flatten()[:4].tolist()
    return found
