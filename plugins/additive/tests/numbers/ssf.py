"""What the vision transformer of SSF's authors gives for images, on tensors of sines, what it starts from and trains:
``python -m peftcore.testing.freeze ssf.py CHECKOUT``."""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
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


def theirs(checkout: Path) -> Any:
    sys.modules.update(
        {"timm.models.layers": timm.layers, "timm.models.layers.helpers": timm.layers.helpers}
    )  # since moved
    return load(checkout / SOURCE.script, absent=ABSENT)


def transformer(checkout: Path) -> Any:
    sizes = {"img_size": 4, "patch_size": 2, "in_chans": 2, "embed_dim": 8, "mlp_ratio": 1.5, "num_classes": 3}
    return theirs(checkout).VisionTransformer(**sizes, depth=1, num_heads=2, tuning_mode="ssf")


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the logits of two images, ``[2, 3]`` flat, and gradients of the first scale and of a norm's shift."""
    model = transformer(checkout).double().eval()
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


def start(checkout: Path) -> dict[str, Any]:
    """Returns what a scale and a shift of 40,000 channels are drawn from."""
    scale, shift = theirs(checkout).init_ssf_scale_shift(40_000)
    return {"gain": drawn(scale), "shift": drawn(shift)}


def trains(checkout: Path) -> dict[str, Any]:
    """Returns the sizes of the scales and shifts that train, in the order of the forward, and what trains besides, when
    their optimizer is made."""
    model = transformer(checkout)
    factory = load(checkout / "optim_factory.py", absent=["timm.optim.nadam", "timm.optim.radam"])
    factory.create_optimizer_v2(model, opt="adamw", lr=1e-3, tuning_mode="ssf")
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    sizes = [trained.pop(place.format(kind)) for place in PLACES for kind in ("ssf_scale", "ssf_shift")]
    return {"sizes": sizes, "besides": list(trained)}
