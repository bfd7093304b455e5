"""What two layers of ARC's authors return, with gradients, on tensors of sines, what they start from and train:
``python -m peftcore.testing.freeze arc.py CHECKOUT``."""

import math
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "DavidYanAnDe/ARC", "8227d57", "Model/ARC_ViT.py")
VERSIONS = ("torch",)
WIDTH, INNER = 8, 3
SIZES = {"mlp_dim": 16, "num_heads": 2, "num_layers": 2, "attention_drop_rate": 0.0, "mlp_drop_rate": 0.0}
# Parts of a layer, and what they are called in timm, on whose names the numbers depend.
PARTS = {"layer.": "blocks.", "attention.projective": "attn.proj", "mlp.fc": "mlp.fc", "att_layer_norm": "norm1"}
PARTS |= {"fnn_layer_norm": "norm2", "layer_norm": "norm"}


def wave(shape: Sequence[int], key: str) -> Tensor:
    """Sines around 0, of norms' gains around 1."""
    around = 1.0 if "norm" in key and key.endswith("weight") else 0.0
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97
    return around + 0.3 * torch.sin(steps).view(*shape)


def renamed(name: str) -> str:
    for theirs, ours in PARTS.items():
        name = name.replace(theirs, ours)
    return name


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the second picture's tokens, their gradients, and those of all that ARC has, by the authors' names."""
    module = load(checkout / SOURCE.script, root=checkout, absent=["Utils", "Utils.tools"])
    config = SimpleNamespace(hidden_size=WIDTH, transformer=SIZES, adapter_dim=INNER, adapter_dropout=0.0)
    model: Any = module.Transformer(config, "ARC").double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            third = next((i for i, each in enumerate(("query", "key", "value")) if each in name), None)
            if third is None:
                parameter.copy_(wave(parameter.shape, renamed(name)))
            else:  # timm has them in one
                whole = name.replace("layer.", "blocks.").replace("attention.", "attn.")
                whole = whole.replace(("query", "key", "value")[third], "qkv")
                shape = (3 * WIDTH, *parameter.shape[1:])
                parameter.copy_(wave(shape, whole).chunk(3)[third])
    x = (4 * wave((2, 5, WIDTH), "x")).requires_grad_()
    y = model(x)
    (y * wave(y.shape, "direction")).sum().backward()
    assert x.grad is not None
    found = {"y": y[1].tolist(), "x": x.grad[1].tolist()}
    added = ((name, p) for name, p in model.named_parameters() if "adapter" in name or "projection" in name)
    return found | {name: parameter.grad.flatten().tolist() for name, parameter in added}


def config_of(width: int, inner: int) -> SimpleNamespace:
    dropouts = {"transformer": SIZES, "adapter_dropout": 0.0}
    return SimpleNamespace(hidden_size=width, adapter_dim=inner, patches={"size": (16, 16)}, **dropouts)


def start(checkout: Path) -> dict[str, Any]:
    """Returns what projections of 2 x 40,000 and the adapters of the first layer start from."""
    module = load(checkout / SOURCE.script, root=checkout, absent=["Utils", "Utils.tools"])
    model: Any = module.Transformer(config_of(2, 40_000), "ARC")
    found = {"attn.projection": model.att_down_projection, "mlp.projection": model.mlp_down_projection}
    for name, adapter in (("attn", model.layer[0].att_adapter), ("mlp", model.layer[0].mlp_adapter)):
        found |= {f"{name}.rescale": adapter.adapter_rescale, f"{name}.bias": adapter.adapter_bias}
    return {name: drawn(each) for name, each in found.items()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what their function leaves to train of a transformer of two layers."""
    freeze = load(checkout / "Utils/Frozen_weight.py").ViT_ARC_Frozen
    module = load(checkout / SOURCE.script, root=checkout, absent=["Utils", "Utils.tools"])
    model = module.ARCVisionTransformer(config_of(WIDTH, INNER), 32, num_classes=3, tuning_mode="ARC")
    freeze(model)
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the width in the configuration of a ViT-B, and the dropout that the script for FGVC puts into it."""
    collections = ModuleType("ml_collections")
    vars(collections)["ConfigDict"] = lambda told=None: SimpleNamespace(**told or {})
    sys.modules["ml_collections"] = collections
    absent = ["Utils", "Utils.tools", "Utils.scheduler", "Utils.Frozen_weight"]
    absent += ["Data_process", "Data_process.FGVC_config", "Data_process.FGVC_loader"]
    script = load(checkout / "FGVC_ARC_train.py", absent=absent)
    seen: list[Any] = []
    vars(script).update(setup=lambda args: (seen.append(args), 0.0), train=lambda args, model: 0.0)
    sys.argv = ["FGVC_ARC_train.py"]
    script.main()
    return {"bottleneck": script.CONFIGS[seen[0].model_type].adapter_dim, "dropout": seen[0].adapt_drop}
