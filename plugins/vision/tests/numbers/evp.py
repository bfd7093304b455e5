"""What the prompted SegFormer of EVP's authors gives for a picture, and derivatives, on tensors of cosines: ``python -m
peftcore.testing.freeze evp.py CHECKOUT``."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source(
    "authors",
    "NiFangBaAGe/Explicit-Visual-Prompt",
    "601ae99",
    "models/mmseg/models/backbones/mix_transformer_evp.py",
)
VERSIONS = ("torch", "timm")
ABSENT = ("mmseg", "mmseg.models", "mmseg.models.builder", "mmseg.utils", "mmcv", "mmcv.runner", "timm.models.registry")
SIZES: dict[str, Any] = {"embed_dims": [4, 8, 12, 16], "num_heads": [1, 2, 2, 4], "mlp_ratios": [2] * 4}
SIZES |= {"depths": [2, 1, 1, 1], "sr_ratios": [4, 2, 1, 1], "norm_layer": nn.LayerNorm, "qkv_bias": True}
PROMPTS = {"scale_factor": 2, "tuning_stage": 1234, "input_type": "fft", "freq_nums": 0.25, "adaptor": "adaptor"}


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def outputs(module: Any, **options: Any) -> dict[str, Any]:
    """Returns states of the last stage ``[1, 16, 2, 2]``; and weighted sums of the derivatives of a weighted sum of
    them by the prompts' parameters and the picture."""
    model = module.MixVisionTransformerEVP(img_size=64, **SIZES, **{**PROMPTS, **options}).double().eval()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(wave(parameter.shape, name))
    picture = wave((1, 3, 64, 60), "picture").requires_grad_()
    states = model(picture)[-1]
    prompts = {n.partition(".")[2]: p for n, p in model.named_parameters() if n.startswith("prompt_generator")}
    prompts["picture"] = picture
    found = torch.autograd.grad((states * wave(states.shape, "direction")).sum(), [*prompts.values()])
    sums = {n: (each * wave(each.shape, "weights")).sum().item() for n, each in zip(prompts, found, strict=True)}
    return {"states": states.tolist(), "gradients": sums}


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the outputs for the frequencies and patches of which prompts are made."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    both = {"handcrafted_tune": True, "embedding_tune": True}
    return {
        "high True": outputs(module, **both, prompt_type="highpass"),
        "low True": outputs(module, **both, prompt_type="lowpass"),
        "high False": outputs(module, handcrafted_tune=True, embedding_tune=False, prompt_type="highpass"),
        "none True": outputs(module, handcrafted_tune=False, embedding_tune=True, prompt_type="highpass"),
    }
