"""Pipelines of diffusers with tiny random parts, and tokenizers that know the words of digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

WORDS = ("<|startoftext|>", "<|endoftext|>", "zero</w>", "one</w>", *"zero", "n", "ze", "zer", "on", "e</w>", "o</w>")
BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
WIDTH = 16
"""Of every encoder's output."""


def clip_tokenizer() -> Any:
    words = list(dict.fromkeys(WORDS))
    return transformers.CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[("z", "e"), ("ze", "r"), ("zer", "o</w>"), ("o", "n"), ("on", "e</w>")],
        model_max_length=6,
    )


def clip(kind: Any = transformers.CLIPTextModel) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(set(WORDS)),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config)


def t5_tokenizer() -> Any:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁zero", -1.0), ("▁one", -1.0)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=8)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=8, d_model=2 * WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def autoencoder(channels: int = 4, **more: Any) -> Any:
    plain = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(latent_channels=channels, **plain, **BLOCKS, **more)


def unet(**more: Any) -> Any:
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    width = {"cross_attention_dim": WIDTH, **more}
    return diffusers.UNet2DConditionModel(sample_size=8, attention_head_dim=4, **kinds, **BLOCKS, **width)


def stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        unet=unet(cross_attention_dim=2 * WIDTH, projection_class_embeddings_input_dim=6 * 8 + WIDTH, **sizes),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def stable_diffusion_3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(distilled: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=distilled,
    )
    pipeline = diffusers.FluxPipeline(
        vae=autoencoder(scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    return pipeline


MADE = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-3": stable_diffusion_3,
    "flux": flux,
}


def saved(kind: str, folder: Path) -> Path:
    """Save one of them to a folder, and return it."""
    torch.manual_seed(0)
    MADE[kind]().save_pretrained(folder)
    return folder
