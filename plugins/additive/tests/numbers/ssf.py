"""What the vision transformer of SSF's authors gives for images, on tensors of sines:
``python -m peftcore.testing.freeze ssf.py CHECKOUT``."""

import sys
from pathlib import Path

import timm
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "dongzelian/SSF", "0135361", "models/vision_transformer.py")
VERSIONS = ("torch", "timm")
ABSENT = ("ipdb", "timm.models.helpers", "timm.models.registry")
# Where something is scaled and shifted, in the order of the forward.
PLACES = ("patch_embed.{}_1", "blocks.0.{}_1", "blocks.0.attn.{}_1", "blocks.0.attn.{}_2", "blocks.0.{}_2")
PLACES += ("blocks.0.mlp.{}_1", "blocks.0.mlp.{}_2", "{}_1")


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the logits of two images, ``[2, 3]`` flat, and gradients of the first scale and of a norm's shift."""
    sys.modules.update(
        {"timm.models.layers": timm.layers, "timm.models.layers.helpers": timm.layers.helpers}
    )  # since moved
    module = load(checkout / SOURCE.script, absent=ABSENT)
    sizes = {"img_size": 4, "patch_size": 2, "in_chans": 2, "embed_dim": 8, "mlp_ratio": 1.5, "num_classes": 3}
    model = module.VisionTransformer(**sizes, depth=1, num_heads=2, tuning_mode="ssf").double().eval()
    scales = [model.get_parameter(place.format("ssf_scale")) for place in PLACES]
    shifts = [model.get_parameter(place.format("ssf_shift")) for place in PLACES]
    with torch.no_grad():
        for index, parameter in enumerate(p for name, p in model.named_parameters() if "ssf" not in name):
            parameter.copy_(wave(tuple(parameter.shape), 0.37 + 0.11 * index))
        for index, (scale, shift) in enumerate(zip(scales, shifts, strict=True)):
            scale.copy_(1 + wave(scale.shape, 0.29 + 0.07 * index))
            shift.copy_(wave(shift.shape, 0.53 + 0.05 * index))
    y = model(wave((2, 2, 4, 4), 0.23))
    y.square().sum().backward()
    return {"outputs": y.flatten().tolist(), "scale": scales[0].grad.tolist(), "shift": shifts[4].grad.tolist()}
