"""What LoRand's authors' adapter returns, with gradients, on tensors of sines, what it starts from, what trains, and
its sizes: ``python -m peftcore.testing.freeze lorand.py CHECKOUT``."""

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

SOURCE = Source("authors", "DongshuoYin/CoLin", "332da5c", "MMDetection/mmdet/models/backbones/swin_lorand.py")
VERSIONS = ("torch",)
WIDTH = 12
ABSENT = ("mmcv.cnn", "mmcv.cnn.bricks", "mmcv.cnn.bricks.transformer", "mmcv.cnn.utils", "mmcv.cnn.utils.weight_init")
ABSENT += ("mmcv.utils", "mmdet.models.utils.ckpt_convert", "mmdet.models.utils.transformer")
ABSENT += ("authors", "authors.models", "authors.utils", "authors.models.builder", "authors.models.backbones")


# Their factors, kept the other way round, and what they are called here.
FACTORS = {"A": "Q", "g": "K", "B": "P"}
PARTS = {"project1": "down", "project2": "up"}


class Base(nn.Module):
    """The base of their modules."""

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()


def wave(shape: Sequence[int], key: str) -> Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97
    return 0.3 * torch.sin(steps).view(*shape)


def imported(file: Path) -> Any:
    """The module of the file, without the packages around it: their library is for training."""
    for name in ABSENT:
        sys.modules[name] = MagicMock()
    sys.modules["authors.models.builder"].BACKBONES.register_module.return_value = lambda model: model
    bases = SimpleNamespace(BaseModule=Base, ModuleList=nn.ModuleList, _load_checkpoint=None)
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


def tensors(part: Any, name: str) -> dict[str, Tensor]:
    """Returns the tensors of one of their maps, those of all branches together."""
    count = range(part.num_branch)
    found = {ours: torch.stack([part.param_dict[f"{each}{i}"] for i in count]) for each, ours in FACTORS.items()}
    return {f"{name}.{each}": tensor for each, tensor in {**found, "bias": part.bias}.items()}


def model(checkout: Path) -> Any:
    """Returns a Swin of one block, as their constructor and their reset make it; norms and feed-forwards are mocks."""
    module = imported(checkout / SOURCE.script)
    module.to_2tuple = lambda size: (size, size)
    swin = module.SwinLoRand(embed_dims=WIDTH, depths=(1,), num_heads=(2,), strides=(4,), out_indices=())
    swin.init_weights()
    return swin


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of both maps start from, 8,400 and 4,200 wide and of rank 40."""
    linear = imported(checkout / SOURCE.script).Lorand_Multi
    down, up = (linear(*widths, num_branch=4, kernel_dim=40) for widths in ((8400, 4200), (4200, 8400)))
    return {name: drawn(each) for name, each in {**tensors(down, "down"), **tensors(up, "up")}.items()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what trains, of a Swin of one block."""
    swin = model(checkout)
    trained, found = {id(each): each for each in swin.parameters() if each.requires_grad}, {}
    for place in ("lorand1", "lorand2"):
        adapter = getattr(swin.stages[0].blocks[0], place)
        for theirs, ours in PARTS.items():
            part = getattr(adapter, theirs)
            assert all(trained.pop(id(each), None) is each for each in part.parameters())
            found |= {f"{place}.{name}": each.numel() for name, each in tensors(part, ours).items()}
    assert not trained
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the sizes of an adapter in a block of theirs."""
    part = model(checkout).stages[0].blocks[0].lorand1.project1
    rank, reduction = part.param_dict["g0"].shape[0], part.in_features // part.out_features
    return {"rank": rank, "branches": part.num_branch, "reduction": reduction}
