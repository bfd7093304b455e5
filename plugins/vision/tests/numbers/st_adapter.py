"""What the CLIP of ST-Adapter's authors makes of two clips of three frames, and the derivatives by its adapters, on
tensors of cosines: ``python -m peftcore.testing.freeze st_adapter.py CHECKOUT``."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vpt import wave

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "linziyi96/st-adapter", "b914b38", "models_adapter.py")
VERSIONS = ("torch",)
SIZES: dict[str, Any] = {"input_resolution": 8, "patch_size": 4, "width": 16, "layers": 3, "heads": 2}
PLACES = {"both": (True, True), "attention": (True, False), "feed-forward": (False, True)}
CLIPS, FRAMES = 2, 3


def outputs(module: Any, before: str, kernel: tuple[int, int, int]) -> dict[str, Any]:
    """Returns some of the tokens of all frames, and of the derivatives of a weighted sum of them."""
    pre_attention, pre_mlp = PLACES[before]
    options = {"adapter_width": 6, "adapter_layers": 3, "adapter_kernel_size": kernel, "num_classes": 3}
    model: Any = module.VisionTransformer(
        **SIZES, **options, adapter_pre_attn=pre_attention, adapter_pre_mlp=pre_mlp
    ).double()
    for name, parameter in model.eval().named_parameters():
        parameter.data = wave(parameter.shape, f"visual.{name}")
    seen: list[Tensor] = []
    model.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
    pixels = wave((CLIPS, 3, FRAMES, 8, 8), "clips").requires_grad_()
    model(pixels)
    adapters = {name: p for name, p in model.named_parameters() if ".adapter_" in name}
    y = seen[0]  # [clips * frames, tokens, 16]
    sums = (y * wave(y.shape, "direction")).sum()
    found = torch.autograd.grad(sums, [pixels, *adapters.values()])
    gradients = {name: each.flatten()[::7].tolist() for name, each in zip(("pixels", *adapters), found, strict=True)}
    return {"y": y[:, ::2, ::5].tolist(), "gradients": gradients}


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the outputs with adapters before both branches, and before each."""
    module = load(checkout / SOURCE.script, absent=("configs",))
    module.LayerNorm, module.DWCONV3D_DISABLE_CUDNN = nn.LayerNorm, False  # theirs rounds to float32
    return {
        "both": outputs(module, "both", (3, 3, 1)),
        "attention": outputs(module, "attention", (3, 1, 1)),
        "feed-forward": outputs(module, "feed-forward", (1, 3, 5)),
    }
