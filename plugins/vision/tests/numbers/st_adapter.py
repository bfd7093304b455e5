"""What the CLIP of ST-Adapter's authors makes of two clips of three frames, and the derivatives by its adapters, on
tensors of cosines; what adapters start from, what trains, and their options:
``python -m peftcore.testing.freeze st_adapter.py CHECKOUT``."""

import argparse
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from vpt import wave

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "linziyi96/st-adapter", "b914b38", "models_adapter.py")
VERSIONS = ("torch",)
SIZES: dict[str, Any] = {"input_resolution": 8, "patch_size": 4, "width": 16, "layers": 3, "heads": 2}
PLACES = {"both": (True, True), "attention": (True, False), "feed-forward": (False, True)}
CLIPS, FRAMES = 2, 3


def transformer(module: Any, before: str, width: int, kernel: tuple[int, int, int]) -> Any:
    """Returns a transformer of three blocks with adapters."""
    pre_attention, pre_mlp = PLACES[before]
    options = {"adapter_width": width, "adapter_layers": 3, "adapter_kernel_size": kernel, "num_classes": 3}
    return module.VisionTransformer(**SIZES, **options, adapter_pre_attn=pre_attention, adapter_pre_mlp=pre_mlp)


def outputs(module: Any, before: str, kernel: tuple[int, int, int]) -> dict[str, Any]:
    """Returns some of the tokens of all frames, and of the derivatives of a weighted sum of them."""
    model = transformer(module, before, 6, kernel).double()
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


def start(checkout: Path) -> dict[str, Any]:
    """Returns what an adapter of 2,500 channels starts from, in a block of theirs."""
    module = load(checkout / SOURCE.script, absent=("configs",))
    adapter = transformer(module, "both", 2500, (3, 1, 1)).transformer.resblocks[0].adapter_pre_attn
    return {name: drawn(each) for name, each in adapter.named_parameters()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what trains, with the defaults of an adapter."""
    module = load(checkout / SOURCE.script, absent=("configs",))
    model = transformer(module, "both", 384, (3, 1, 1))
    return {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}


class Parsed(Exception):
    """A command's arguments are asked for, of this parser."""


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their model with adapters in front of both branches, and the frames of a command."""
    module = load(checkout / SOURCE.script, absent=("configs",))
    module.CLIP_VIT_B16_PATH = "any"
    with mock.patch.object(module, "VisionTransformer") as made, mock.patch.object(module.torch.jit, "load"):
        module.clip_vit_base_patch16_adapter24x384(num_classes=3)
    told = SimpleNamespace(**made.call_args.kwargs)
    (before,) = (each for each, places in PLACES.items() if places == (told.adapter_pre_attn, told.adapter_pre_mlp))
    main, frames = load(checkout / "main.py", absent=("configs", "video_dataset", "video_dataset.dataset")), None

    def asked(parser: argparse.ArgumentParser) -> Any:
        nonlocal frames
        frames = parser.get_default("num_frames")
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", asked), contextlib.suppress(Parsed):
        main.main()
    kernel = [*told.adapter_kernel_size]
    return {"frames": frames, "bottleneck": told.adapter_width, "kernel": kernel, "before": before}
