"""What the prompted SegFormer of EVP's authors gives for a picture, and derivatives, on tensors of cosines, what its
prompts start from, what trains, and the options of a configuration:
``python -m peftcore.testing.freeze evp.py CHECKOUT``."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source(
    "authors",
    "NiFangBaAGe/Explicit-Visual-Prompt",
    "601ae99",
    "models/mmseg/models/backbones/mix_transformer_evp.py",
)
VERSIONS = ("torch", "timm")
ABSENT = ("mmseg", "mmseg.models", "mmseg.models.builder", "mmseg.utils", "mmcv", "mmcv.runner", "timm.models.registry")
SEGMENTING = ("models.setr", "models.mmseg", "models.mmseg.models", "mmcv.utils", "thop", "IPython")
SIZES: dict[str, Any] = {"embed_dims": [4, 8, 12, 16], "num_heads": [1, 2, 2, 4], "mlp_ratios": [2] * 4}
SIZES |= {"depths": [2, 1, 1, 1], "sr_ratios": [4, 2, 1, 1], "norm_layer": nn.LayerNorm, "qkv_bias": True}
WIDE: dict[str, Any] = {**SIZES, "embed_dims": [512] * 4, "num_heads": [1] * 4, "depths": [1] * 4}
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


def configuration(checkout: Path) -> dict[str, Any]:
    """Returns the options of the prompts in a configuration."""
    told = yaml.safe_load((checkout / "configs/train/segformer/train_segformer_evp_cod.yaml").read_text())
    return dict(told["model"]["args"]["encoder_mode"])


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the prompts' parameters start from where a stage is 512 wide."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    model = module.MixVisionTransformerEVP(img_size=64, **WIDE, **configuration(checkout))
    return {name: drawn(each) for name, each in model.prompt_generator.named_parameters()}


def trains(checkout: Path) -> dict[str, Any]:
    """Returns the sizes of what trains of their backbone, and whether all of a decoder does."""
    backbone = load(checkout / SOURCE.script, absent=ABSENT).MixVisionTransformerEVP
    module = load(checkout / "models/segformer.py", root=checkout, absent=(*ABSENT, *SEGMENTING))
    told = configuration(checkout)
    parts = {"backbone": backbone(img_size=64, **SIZES, **{**told, "scale_factor": 2}), "decode_head": nn.Linear(4, 1)}
    with mock.patch.object(module, "build_segmentor", lambda config: nn.ModuleDict(parts)):
        module.SegFormer(inp_size=64, encoder_mode=told, loss="bce")
    own = {name: each.numel() for name, each in parts["backbone"].named_parameters() if each.requires_grad}
    return {"backbone": own, "decoder": all(each.requires_grad for each in parts["decode_head"].parameters())}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration."""
    told = configuration(checkout)
    kinds = {"highpass": "high", "lowpass": "low"}
    found = {"reduction": told["scale_factor"], "share": told["freq_nums"], "patches": told["embedding_tune"]}
    return {**found, "frequencies": kinds[told["prompt_type"]] if told["handcrafted_tune"] else "none"}
