"""What the CLIP of AIM's authors makes of two clips of three frames, and the derivatives by what they train, on
tensors of cosines, and what it starts from: ``python -m peftcore.testing.freeze aim.py CHECKOUT``."""

import ast
import inspect
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import torch
from adaptformer import run_statements
from torch import Tensor, nn
from vpt import wave

from peftcore.registry.evidence import Source
from peftcore.testing import drawn

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


def theirs(checkout: Path) -> Any:
    """Returns the module with the authors' model."""
    absent = {name: ModuleType(name) for name in ABSENT}
    vars(absent["builder"]).update(BACKBONES=Registry())
    vars(absent["mmaction.utils"]).update(get_root_logger=None)
    sys.modules.update(absent)
    code = (checkout / SOURCE.script).read_text().replace("from ..builder", "from builder")  # without its package
    module = ModuleType("vit_clip")
    exec(compile(code, SOURCE.script, "exec"), vars(module))
    return module


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the outputs with one and with two adapters round the temporal attention."""
    module = theirs(checkout)
    vars(module).update(LayerNorm=nn.LayerNorm)  # theirs rounds to float32
    return {"1": outputs(module, 1, 0.5), "2": outputs(module, 2, 1.0)}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the adapters of a block 640 wide and the times of frames start from, by the authors' names."""
    sizes = {"input_resolution": 8, "patch_size": 4, "width": 640, "layers": 1, "heads": 2}
    model = theirs(checkout).ViT_CLIP(**sizes, num_frames=3, drop_path_rate=0.2, num_tadapter=2)
    model.init_weights()
    ours = ("Adapter", "temporal")
    return {name: drawn(each) for name, each in model.named_parameters() if any(part in name for part in ours)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what their script leaves to train of the model without a head."""
    model = theirs(checkout).ViT_CLIP(**SIZES, num_frames=FRAMES, drop_path_rate=0.2)
    run_statements(checkout / "tools/train.py", ast.For, "requires_grad = False", model=model, logger=Mock())
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options in the configuration for Kinetics-400 and a ViT-B, and what it leaves to the functions."""
    module = theirs(checkout)
    told = runpy.run_path(str(checkout / "configs/recognition/vit/vitclip_base_k400.py"))["model"]["backbone"]
    model, adapter = (inspect.signature(each).parameters for each in (module.ViT_CLIP, module.Adapter))
    found = {"frames": told["num_frames"], "scale": told["adapter_scale"], "drop_path": told["drop_path_rate"]}
    assert "num_tadapter" not in told
    return found | {"temporal_adapters": model["num_tadapter"].default, "ratio": adapter["mlp_ratio"].default}
