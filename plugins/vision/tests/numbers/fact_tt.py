"""What FacT-TT's authors add to an attention and to a feed-forward of width 6, on tensors of sines,
what they start from and train:
``python -m peftcore.testing.freeze fact_tt.py CHECKOUT``."""

import ast
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
import yaml
from adaptformer import run_statements
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "JieShibo/PETL-ViT", "026e4f1", "FacT/fact_tt.py")
VERSIONS = ("torch", "timm")
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
    qkv, up, same = torch.zeros(1, 1, 18).double(), torch.zeros(1, 1, 24).double(), nn.Identity()
    layer = SimpleNamespace(s=50.0, dim=3, dp=same, num_heads=1, scale=1.0, attn_drop=same, proj_drop=same, drop=same)
    layer.qkv, layer.fc1 = lambda x: qkv, lambda x: up
    layer.proj = layer.fc2 = lambda x: torch.zeros(1, 1, 6).double()
    layer.act = lambda x: 5 * wave(1, 1, 24, step=2.1)  # what the second matrix reads
    for name, rows, columns, step in ("fc1", 12, 3, 1.7), ("fc2", 3, 12, 1.9), ("q", 3, 3, 3.1), ("k", 3, 3, 3.3):
        setattr(layer, f"{name}_FacTs", linear(rows, columns, step=step))
    layer.v_FacTs, layer.proj_FacTs = linear(3, 3, step=3.7), linear(3, 3, step=3.9)
    output = module.fact_forward_attn(layer, 5 * wave(1, 1, 6, step=2.1))
    down = module.fact_forward_mlp(layer, 5 * wave(1, 1, 6, step=2.1))
    q, k, v = qkv.flatten().chunk(3)
    found = {"q": q, "k": k, "v": v, "out": output, "up": up, "down": down}
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}


def transformer(checkout: Path, depth: int, rank: int) -> Any:
    """Returns a vision transformer, 768 wide as it has to be, with the authors' factors."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    timm.models.layers = timm.layers  # since moved
    sizes = {"img_size": 16, "patch_size": 16, "embed_dim": 768, "depth": depth, "num_heads": 2, "num_classes": 5}
    module.vit = timm.models.vision_transformer.VisionTransformer(**sizes, mlp_ratio=4)
    module.set_FacT(module.vit, dim=rank)
    return module.vit


def start(checkout: Path) -> dict[str, Any]:
    """Returns what factors of rank 200 start from."""
    model = transformer(checkout, 1, 200)
    found = {"U": model.FacTu.weight, "V": model.FacTv.weight}
    block = model.blocks[0]
    for name in ("q", "k", "v", "proj"):
        found["out" if name == "proj" else name] = getattr(block.attn, f"{name}_FacTs").weight
    found |= {"up": block.mlp.fc1_FacTs.weight, "down": block.mlp.fc2_FacTs.weight}
    return {name: drawn(each) for name, each in found.items()}


def trains(checkout: Path) -> dict[str, Any]:
    """Returns the sizes of the factors that train of a vision transformer of two blocks, and what trains besides."""
    model, trainable = transformer(checkout, 2, 3), list[Any]()
    run_statements(
        checkout / SOURCE.script, ast.For, "requires_grad = False", vit=model, trainable=trainable, total_param=0
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: parameter.numel() for parameter in trainable}
    factors = [size for name, size in found.items() if "FacT" in name]
    return {"factors": sorted(factors), "besides": [name for name in found if "FacT" not in name]}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the rank and the scale in the configuration of the task that their script has by default, and dropout."""
    text = ast.parse((checkout / SOURCE.script).read_text())
    calls = [each for each in ast.walk(text) if isinstance(each, ast.Call) and "'--dataset'" in ast.unparse(each)]
    (task,) = (ast.literal_eval(each.value) for call in calls for each in call.keywords if each.arg == "default")
    told = yaml.safe_load((checkout / f"FacT/configs/tt/{task}.yaml").read_text())
    block = transformer(checkout, 1, 3).blocks[0]
    return {"rank": told["rank"], "scale": told["scale"], "dropout": block.attn.dp.p}
