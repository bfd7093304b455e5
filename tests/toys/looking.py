"""Folders of tiny models that hold a configuration and no weights, and the models themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import timm
import transformers
from torch import nn

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_WORDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VIT = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 32, "num_classes": 5}


def _transformers(name: str, config: str, **sizes: Any) -> dict[str, Any]:
    return {**getattr(transformers, config)(**sizes).to_dict(), "architectures": [name]}


CONFIGS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "llama": lambda: _transformers("LlamaForCausalLM", "LlamaConfig", **_SIZES, **_WORDS, num_key_value_heads=1),
    "bert": lambda: _transformers(
        "BertForSequenceClassification", "BertConfig", **_SIZES, **_WORDS, max_position_embeddings=64
    ),
    "gpt2": lambda: _transformers("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, **_WORDS),
    "t5": lambda: _transformers(
        "T5ForConditionalGeneration", "T5Config", vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    ),
    "clip": lambda: _transformers(
        "CLIPModel",
        "CLIPConfig",
        text_config={**_SIZES, **_WORDS},
        vision_config={**_SIZES, "image_size": 16, "patch_size": 8},
    ),
    "wav2vec2": lambda: _transformers(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        vocab_size=40,
        conv_dim=[16] * 7,
        num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=16,
        **_SIZES,
    ),
    "vit": lambda: {
        "architecture": "vit_tiny_patch16_224",
        "model_args": _VIT,
        "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 5},
    },
    "unet": lambda: {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    },
}


def folder_of(name: str, under: Path) -> Path:
    """A folder with nothing but the configuration."""
    folder = under / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]()), encoding="utf-8")
    return folder


def real(name: str, folder: Path) -> nn.Module:
    """The same model in memory, with random weights, as its library loads it."""
    config = CONFIGS[name]()
    if "architecture" in config:
        return timm.create_model(f"local-dir:{folder}").train()
    if "_class_name" in config:
        unet = diffusers.UNet2DConditionModel.from_config(config).train()
        unet.register_to_config(_name_or_path=str(folder))
        return unet
    read = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config["architectures"][0])(read).train()
