"""What a matrix behind the authors' RepAdapter gives, and what they merge into it, on tensors of sines, what it starts
from, what trains, and its options: ``python -m peftcore.testing.freeze repadapter.py CHECKOUT``."""

import inspect
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "luogen1996/RepAdapter", "360992f", "repadapter.py")
VERSIONS = ("torch", "timm")
PARTS = {"conv_A.weight": "A", "conv_A.bias": "a", "conv_B.weight": "B", "conv_B.bias": "b"}
"""Tensors of their adapter, and what they are called here."""
STEPS = {"conv_A.weight": 1.1, "conv_A.bias": 1.3, "conv_B.weight": 1.7, "conv_B.bias": 1.9, "weight": 2.3, "bias": 2.9}


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the output for two tokens of width 6, ``[2, 5]``; then the weight and the bias after merging."""
    module = load(checkout / SOURCE.script)
    block: Any = timm.models.vision_transformer.Block(dim=6, num_heads=1)
    block.adapter_attn, block.s = module.RepAdapter(in_features=6, hidden_dim=4, groups=2, scale=0.7), 0.7
    block.attn.qkv = nn.Linear(6, 5)
    block.double().eval()
    for part in (block.adapter_attn, block.attn.qkv):
        for name, parameter in part.named_parameters():
            parameter.copy_(wave(*parameter.shape, step=STEPS[name]))
    output = block.attn.qkv(block.adapter_attn(5 * wave(1, 2, 6, step=2.1)))[0]
    torch.set_default_dtype(torch.float64)  # the identity that is merged along has it
    module.set_RepWeight(nn.Sequential(block), "repattn")
    torch.set_default_dtype(torch.float32)
    qkv = block.attn.qkv
    return {"output": output.tolist(), "weight": qkv.weight.tolist(), "bias": qkv.bias.tolist()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what an adapter of 40,000 features starts from."""
    adapter = load(checkout / SOURCE.script).RepAdapter(in_features=40_000)
    return {PARTS[name]: drawn(each) for name, each in adapter.named_parameters()}


class Made(Exception):
    """The optimizer was made."""


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what trains by their command, in a transformer of one block, as wide as their adapters."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 768, "depth": 1, "num_heads": 1, "mlp_ratio": 0.1}
    model = timm.models.VisionTransformer(**sizes)
    load(checkout / SOURCE.script)
    own = SimpleNamespace(os=mock.MagicMock(), set_seed=mock.MagicMock(), throughput=mock.MagicMock(), torch=torch)
    own.get_config = lambda method, dataset, few_shot: {"scale": 1.0, "class_num": 3}
    own.get_data = lambda dataset, few_shot: (None, None)
    absent = (
        "avalanche",
        "avalanche.evaluation",
        "avalanche.evaluation.metrics",
        "avalanche.evaluation.metrics.accuracy",
    )
    modules = {**{name: mock.MagicMock() for name in absent}, "dataset": own, "utils": own}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(sys, "argv", ["train.py"]),
        mock.patch("timm.models.create_model", lambda *args, **kwargs: model),
        mock.patch.object(nn.Module, "cuda", lambda module: module),
        mock.patch("torch.optim.AdamW", side_effect=Made) as made,
    ):
        try:
            runpy.run_path(str(checkout / "train.py"), run_name="__main__")
        except Made:
            trained = {id(each) for each in made.call_args.args[0]}
    found = {name: each.numel() for name, each in model.named_parameters() if id(each) in trained}
    for theirs, ours in PARTS.items():
        found = {name.removeprefix("blocks.0.adapter_").replace(theirs, ours): size for name, size in found.items()}
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the arguments that their functions have by default, and the dropout of an adapter."""
    module = load(checkout / SOURCE.script)
    told = {name: each.default for name, each in inspect.signature(module.set_RepAdapter).parameters.items()}
    adapter = module.RepAdapter()
    return {"bottleneck": told["dim"], "groups": adapter.groups, "scale": told["s"], "dropout": adapter.dropout.p}
