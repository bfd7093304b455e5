"""Files of LoRA in the names of the original code of Flux, Wan and Qwen-Image, and pipelines of diffusers for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore.files.formats.original_names import OriginalModule, original_names

diffusers = pytest.importorskip("diffusers")
KOHYA = "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"
COMFYUI = tuple(f"diffusion_model.{{}}.{leaf}" for leaf in ("lora_down.weight", "lora_up.weight", "alpha"))
PEFT = tuple(f"diffusion_model.{{}}.{leaf}" for leaf in ("lora_A.weight", "lora_B.weight"))
XLABS = "{}.down.weight", "{}.up.weight"
BARE = "{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha"
FORMS: dict[str, tuple[str, ...]] = {
    "kohya": KOHYA, "comfyui": COMFYUI, "peft": PEFT, "xlabs": XLABS, "bare": BARE,
}  # fmt: skip
"""The names of the two factors and of alpha, where a file has one."""


def flux() -> tuple[nn.Module, dict[str, Any]]:
    """A small Flux with guidance, and its inputs."""
    torch.manual_seed(4)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 6, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.3, 0.5]),
        "img_ids": torch.randint(0, 4, (6, 3)).float(),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.ones(2),
    }


def wan(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A small Wan, from text or (with `options`) from an image too, and its inputs."""
    torch.manual_seed(5)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=14,
        freq_dim=8, ffn_dim=40, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32, **options,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 512 if options else 7, 14),
    }
    return model, inputs | ({"encoder_hidden_states_image": torch.randn(1, 5, 10)} if options else {})


def wan_from_images() -> tuple[nn.Module, dict[str, Any]]:
    """A small Wan that reads an image too."""
    return wan(image_dim=10, added_kv_proj_dim=24)


def qwen_image() -> tuple[nn.Module, dict[str, Any]]:
    """A small Qwen-Image, and its inputs."""
    torch.manual_seed(6)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=14, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 14),
        "timestep": torch.tensor([0.3, 0.5]),
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.long),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


@dataclass(frozen=True)
class Model:
    """A model whose files are tried."""

    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    pipeline: str
    """Diffusers' pipeline, by the name of its class."""
    others: tuple[str, ...]
    """Its other parts, which are left out."""


VAE = ("vae", "tokenizer", "text_encoder", "scheduler")
MODELS = {
    "flux": Model(flux, "FluxPipeline", (*VAE, "text_encoder_2", "tokenizer_2")),
    "wan": Model(wan, "WanPipeline", VAE),
    "wan_from_images": Model(wan_from_images, "WanImageToVideoPipeline", (*VAE, "image_processor", "image_encoder")),
    "qwen_image": Model(qwen_image, "QwenImagePipeline", VAE),
}


def pipeline(name: str, model: nn.Module) -> Any:
    """Diffusers' pipeline around a transformer alone."""
    kind = MODELS[name]
    return getattr(diffusers, kind.pipeline)(transformer=model, **dict.fromkeys(kind.others))


def names_of(model: nn.Module) -> dict[str, OriginalModule]:
    """All linear maps of a model by their original names, which are its own where no others are known."""
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = original_names([path for path, _ in model.named_modules()])
    found = found or {path: OriginalModule((path,)) for path in layers}
    return {name: original for name, original in found.items() if layers.issuperset(original.paths)}


@torch.no_grad()
def write(
    model: nn.Module,
    path: Path,
    form: str,
    names: Mapping[str, OriginalModule],
    *,
    std: float = 0.1,
    alpha: float = 3.0,
) -> dict[str, Tensor]:
    """Save a LoRA of rank 4, with noise in all factors, at these modules of the original code."""
    torch.manual_seed(7)
    tensors = {}
    for name, original in names.items():
        modules = [model.get_submodule(each) for each in original.paths]
        outputs, inputs = sum(each.out_features for each in modules), modules[0].in_features  # type: ignore[misc]
        spelled = name.replace(".", "_") if form == "kohya" else name
        values = (std * torch.randn(4, inputs), std * torch.randn(outputs, 4), torch.tensor(alpha))  # type: ignore[arg-type]
        tensors |= {each.format(spelled): value for each, value in zip(FORMS[form], values, strict=False)}
    save_file(tensors, path)
    return tensors
