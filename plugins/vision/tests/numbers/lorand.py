"""What LoRand's authors' adapter returns, with gradients, on tensors of sines:
``python -m peftcore.testing.freeze lorand.py CHECKOUT``."""

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

SOURCE = Source("authors", "DongshuoYin/CoLin", "332da5c", "MMDetection/mmdet/models/backbones/swin_lorand.py")
VERSIONS = ("torch",)
WIDTH = 12
ABSENT = ("mmcv.cnn", "mmcv.cnn.bricks", "mmcv.cnn.bricks.transformer", "mmcv.cnn.utils", "mmcv.cnn.utils.weight_init")
ABSENT += ("mmcv.utils", "mmdet.models.utils.ckpt_convert", "mmdet.models.utils.transformer")
ABSENT += ("authors", "authors.models", "authors.utils", "authors.models.builder", "authors.models.backbones")


def wave(shape: Sequence[int], key: str) -> Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97
    return 0.3 * torch.sin(steps).view(*shape)


def imported(file: Path) -> Any:
    """The module of the file, without the packages around it: their library is for training."""
    for name in ABSENT:
        sys.modules[name] = MagicMock()
    bases = SimpleNamespace(BaseModule=nn.Module, ModuleList=nn.ModuleList, _load_checkpoint=None)
    sys.modules["mmcv"] = sys.modules["mmcv.runner"] = bases  # type: ignore[assignment]
    spec = importlib.util.spec_from_file_location("authors.models.backbones.lorand", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the adapter's output for three tokens, and the gradients of them and of each tensor."""
    adapter: Any = imported(checkout / SOURCE.script).Lorand(WIDTH, 2).double().eval()
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(3 * wave(parameter.shape, name))
    x = (4 * wave((1, 3, WIDTH), "x")).requires_grad_()
    y = adapter(x)
    (y * wave(y.shape, "direction")).sum().backward()
    assert x.grad is not None
    found = {"y": y.flatten().tolist(), "x": x.grad.flatten().tolist()}
    return found | {name: p.grad.flatten()[:6].tolist() for name, p in adapter.named_parameters()}
