"""What the transformer of DTL's authors gives for images, and the derivatives by its side network, on tensors of
cosines, and what it starts from and trains: ``python -m peftcore.testing.freeze dtl.py CHECKOUT``."""

import ast
from pathlib import Path
from typing import Any

import torch
from adaptformer import run_statements
from torch import nn
from vpt import wave

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "heekhero/DTL", "bf6c51e", "models/vision_transformer.py")
VERSIONS = ("torch", "timm")
ABSENT = ("utils", "utils.utils", "timm.models.registry")
# The grid of patches has 14 rows and columns, as in their code.
SIZES: dict[str, Any] = {"img_size": 28, "patch_size": 2, "embed_dim": 8, "depth": 3, "num_heads": 2, "mlp_ratio": 1.5}


def outputs(module: Any, fusion: int, beta: float) -> dict[str, Any]:
    """Returns logits ``[2, 3]`` and derivatives of a weighted sum of them, for feedback behind the last two blocks."""
    model = module.VisionTransformer(
        **SIZES, num_classes=3, r=2, lora_before_blocks="012", add_after_blocks="12", beta=beta, fusion_size=fusion
    )
    for name, parameter in model.double().eval().named_parameters():
        parameter.data.copy_(wave(parameter.shape, name))
    logits = model(wave((2, 3, 28, 28), "images"))
    side = {name: parameter for name, parameter in model.named_parameters() if name.startswith("lora")}
    found = torch.autograd.grad((logits * wave((2, 3), "direction")).sum(), side.values())
    gradients = {name: each.tolist() for name, each in zip(side, found, strict=True)}
    return {"logits": logits.tolist(), "gradients": gradients}


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the outputs of DTL, and of DTL+ with kernels of 3 and 4."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    return {str(fusion): outputs(module, fusion, beta) for fusion, beta in ((0, 100.0), (3, 2.0), (4, 2.0))}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the side network of a block 1,600 wide and the convolution start from."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    sizes = {**SIZES, "embed_dim": 1600, "depth": 1}
    model = module.VisionTransformer(**sizes, r=25, lora_before_blocks="0", add_after_blocks="0", fusion_size=3)
    side = model.lora_dict["0"]
    found = {"A": side.lora_A, "C": side.lora_B, "fusion": model.lora_fusion.weight}
    return {name: drawn(each) for name, each in found.items()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what their function leaves to train of a transformer of three blocks, with a convolution."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    blocks = {"lora_before_blocks": "012", "add_after_blocks": "12", "fusion_size": 3}
    model = module.VisionTransformer(**SIZES, num_classes=3, r=2, **blocks)
    found = run_statements(checkout / "train_vit_vtab.py", ast.FunctionDef, "def mark_trainable_parameters", nn=nn)
    found["mark_trainable_parameters"](model, "vit_base_patch16_224_in21k")
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their command for DTL without a convolution, of twelve blocks."""
    told = flags((checkout / "train_scripts/vit/vtab/cifar_100/train_dtl.sh").read_text())
    first = int(str(told["add_after_blocks"]).split("-")[0])
    return {"rank": told["r"], "beta": told["beta"], "start": first / 12, "kernel": told["fusion_size"] or None}
