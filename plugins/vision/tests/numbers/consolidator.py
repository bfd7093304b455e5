"""What the authors' Consolidator returns, with gradients, and what it merges into, on tensors of sines, what it starts
from, what trains, and its options: ``python -m peftcore.testing.freeze consolidator.py CHECKOUT``."""

import inspect
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "THU-MIG/Consolidator", "545d006", "model/vision_transformer_timm.py")
VERSIONS = ("torch", "timm")
ABSENT = ("timm.models.helpers", "timm.models.registry", "timm.models.layers.helpers")
TRAINING = ("mmcv", "mmcv.runner", "lib.datasets", "lib.samplers", "lib.config", "engine", "model")
INPUTS, OUTPUTS = 12, 24
CASES = {"one": ((4,), False), "dealt": ((4,), True), "several": ((6, 3), True)}


def wave(shape: Sequence[int], key: str) -> Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97
    return 0.3 * torch.sin(steps).view(*shape)


def one_block(checkout: Path, **sizes: Any) -> Any:
    """Returns their transformer of one block with a branch of two groups at each matrix, and nothing of the methods
    that they compare with."""
    module, compared = load(checkout / SOURCE.script, absent=ABSENT), ("prompt_tuning", "LoRA", "adapter", "prefix")
    module.to_2tuple, module.named_apply = timm.layers.to_2tuple, timm.models.named_apply  # at other places since
    told = {"img_size": 8, "patch_size": 4, "depth": 1, "num_heads": 1, "num_classes": 3, "fc_groups": (2,)}
    return module.VisionTransformer(**told, **sizes, **{f"{name}_dim": 0 for name in compared})


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns by case the output of a row of three tokens, gradients, and the merged weight and bias."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    torch.set_default_dtype(torch.float64)  # of what is merged
    found: dict[str, Any] = {}
    for case, (groups, dealt) in CASES.items():
        layer: Any = module.Consolidator(INPUTS, OUTPUTS, fc_groups=groups, with_channel_shuffle=dealt).eval()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(wave(parameter.shape, name))
        x = (4 * wave((1, 3, INPUTS), "x")).requires_grad_()
        y = layer(x)
        (y * wave(y.shape, "direction")).sum().backward()
        assert x.grad is not None
        weight, bias = layer.get_actual_params()
        parts = {
            "y": y,
            "x": x.grad,
            "weight": weight[:4],
            "bias": bias,
            "G": layer.fc_rep_branches[-1].group_fc.weight.grad,
        }
        found[case] = {name: part.flatten().tolist() for name, part in parts.items()}
    torch.set_default_dtype(torch.float32)
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the branch of a matrix of 40,000 outputs starts from."""
    (branch,) = one_block(checkout, embed_dim=20, mlp_ratio=2000).blocks[0].mlp.fc1.fc_rep_branches
    return {"G": drawn(branch.group_fc.weight), "c": drawn(branch.group_fc.bias)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what trains, by name."""
    model = one_block(checkout, embed_dim=8)
    return {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the arguments that a matrix has by default, its bound, and the drop of a command that names none."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    told = {name: each.default for name, each in inspect.signature(module.Consolidator).parameters.items()}
    command = load(checkout / "train.py", absent=TRAINING).get_args_parser().parse_args(["--cfg", "any"])
    found = {"groups": list(told["fc_groups"]), "reorder": told["with_channel_shuffle"]}
    return {**found, "init_range": module.REP_BRANCH_INIT_STD, "stochastic_depth": command.consolidator_drop_ratio}
