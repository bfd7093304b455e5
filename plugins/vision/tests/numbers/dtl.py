"""What the transformer of DTL's authors gives for images, and the derivatives by its side network, on tensors of
cosines: ``python -m peftcore.testing.freeze dtl.py CHECKOUT``."""

from pathlib import Path
from typing import Any

import torch
from vpt import wave

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "heekhero/DTL", "bf6c51e", "models/vision_transformer.py")
VERSIONS = ("torch", "timm")
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
    module = load(checkout / SOURCE.script, root=checkout, absent=("utils", "utils.utils", "timm.models.registry"))
    return {str(fusion): outputs(module, fusion, beta) for fusion, beta in ((0, 100.0), (3, 2.0), (4, 2.0))}
