"""What the CLIP of AIM's authors makes of two clips of three frames, and the derivatives by what they train, on
tensors of cosines: ``python -m peftcore.testing.freeze aim.py CHECKOUT``."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from vpt import wave

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "taoyang1122/adapt-image-models", "b3580d2", "mmaction/models/backbones/vit_clip.py")
VERSIONS = ("torch", "timm", "einops")
ABSENT = ("clip", "mmaction", "mmaction.utils", "builder")
SIZES: dict[str, Any] = {"input_resolution": 8, "patch_size": 4, "width": 16, "layers": 3, "heads": 2}
CLIPS, FRAMES = 2, 3


class Registry:
    """Registers nothing, and leaves classes as they are."""

    def register_module(self) -> Any:
        return lambda each: each


def outputs(module: Any, adapters: int, scale: float) -> dict[str, Any]:
    """Returns some of the tokens of all frames behind the blocks, the class tokens behind the norm, and some
    derivatives of a weighted sum of both."""
    model: Any = module.ViT_CLIP(
        **SIZES, num_frames=FRAMES, drop_path_rate=0.2, num_tadapter=adapters, adapter_scale=scale
    ).double()
    for name, parameter in model.eval().named_parameters():
        parameter.data = wave(parameter.shape, f"visual.{name}")
    seen: list[Tensor] = []
    model.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
    pixels = wave((CLIPS, 3, FRAMES, 8, 8), "clips").requires_grad_()
    features = model(pixels)[..., 0, 0].transpose(1, 2)  # [clips, frames, 16]
    trained = {n: p for n, p in model.named_parameters() if "Adapter" in n or n.startswith(("temporal", "ln_post"))}
    y = seen[0].transpose(0, 1)  # [clips * frames, tokens, 16]
    sums = (y * wave(y.shape, "direction")).sum() + (features * wave(features.shape, "features")).sum()
    found = torch.autograd.grad(sums, [pixels, *trained.values()])
    gradients = {n: each.flatten()[::7].tolist() for n, each in zip(("pixels", *trained), found, strict=True)}
    return {"y": y[:, ::2, ::5].tolist(), "features": features.tolist(), "gradients": gradients}


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the outputs with one and with two adapters round the temporal attention."""
    absent = {name: ModuleType(name) for name in ABSENT}
    vars(absent["builder"]).update(BACKBONES=Registry())
    vars(absent["mmaction.utils"]).update(get_root_logger=None)
    sys.modules.update(absent)
    code = (checkout / SOURCE.script).read_text().replace("from ..builder", "from builder")  # without its package
    module = ModuleType("vit_clip")
    exec(compile(code, SOURCE.script, "exec"), vars(module))
    vars(module).update(LayerNorm=nn.LayerNorm)  # theirs rounds to float32
    return {"1": outputs(module, 1, 0.5), "2": outputs(module, 2, 1.0)}
