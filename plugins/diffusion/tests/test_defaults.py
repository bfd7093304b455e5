"""Defaults of diffusion methods, and what fixes them."""

from typing import Any

import pytest
from named_defaults import Free, Held, assert_as_said, rows

CONTROLNET = "lllyasviel/ControlNet@ed85cd1"
DIFFFIT = "mkshing/DiffFit-pytorch@78dc2d1, difffit_pytorch"
LYCORIS = "KohakuBlueleaf/LyCORIS@f49d30d"
LOCON = "cyber-meow/LyCORIS-evaluation@7c5758c, exp_configs/training_configs/exp-1004-sd15-lora8a4-full-a.toml"
T2I = "TencentARC/T2I-Adapter"

HELD: Held = {
    ("controlnet", "scale"): (1.0, f"{CONTROLNET}, cldm/cldm.py: self.control_scales = [1.0] * 13"),
    ("controlnet", "guess_mode"): (
        False,
        f"{CONTROLNET}, gradio_canny2image.py: gr.Checkbox(label='Guess Mode', value=False)",
    ),
    ("controlnet", "channels"): (3, f"{CONTROLNET}, models/cldm_v15.yaml: hint_channels: 3"),
    ("custom_diffusion", "initializer"): (
        None,
        "adobe-research/custom-diffusion@7c19c9a, src/diffusers_training.py: --initializer_token default='ktn+pll+ucd'"
        "; ours is None because ids of words are the tokenizer's",
    ),
    ("difffit", "scales"): (
        "branches",
        f"{DIFFFIT}/diffusers_models/attention.py: gamma_attn1, gamma_attn2 and gamma_ff of a block; ours leaves out "
        "those of attention_processor.py, which are no part of the paper's equation",
    ),
    ("difffit", "blocks"): (None, f"{DIFFFIT}/diffusers_models/attention.py: every BasicTransformerBlock has them"),
    ("difffit", "classes"): (True, f'{DIFFFIT}/utils.py: trainable_names = ["bias","norm","gamma","y_embed"]'),
    ("ip_adapter", "scale"): (1.0, "tencent-ailab/IP-Adapter@62e4af9, ip_adapter/attention_processor.py: scale=1.0"),
    ("ip_adapter", "tokens"): (4, "tencent-ailab/IP-Adapter@62e4af9, ip_adapter/attention_processor.py: num_tokens=4"),
    ("locon", "rank"): (16, f"{LYCORIS}, example_configs/training_configs/kohya/lora_config.toml: network_dim = 16"),
    ("locon", "alpha"): (8.0, f"{LYCORIS}, example_configs/training_configs/kohya/lora_config.toml: network_alpha = 8"),
    ("locon", "conv_rank"): (8, f"{LOCON}: conv_dim=8, the paper's; also in {LYCORIS}, docs/Demo.md: (16,8) for LoCon"),
    ("locon", "conv_alpha"): (
        1.0,
        f"{LOCON}: conv_alpha=4; ours is 1.0, as that of LycorisNetworkKohya in lycoris/kohya.py",
    ),
    ("svdiff", "scale"): (1.0, "mkshing/svdiff-pytorch@a78f69e, inference.py: --spectral_shifts_scale default=1.0"),
    ("svdiff", "vector_lr"): (1e-6, "mkshing/svdiff-pytorch@a78f69e, README.md: --learning_rate_1d=1e-6"),
    ("t2i_adapter", "scale"): (1.0, f"{T2I}@c408b05, Adapter/inference_base.py: --cond_weight default=1.0"),
    ("t2i_adapter", "channels"): (3, f"{T2I}@16bba67, train_depth.py: cin=3 * 64"),
    ("t2i_adapter", "blocks"): (2, f"{T2I}@16bba67, train_depth.py: nums_rb=2"),
    ("textual_inversion", "initializer"): (
        None,
        "rinongal/textual_inversion@424192d, configs/latent-diffusion/txt2img-1p4B-finetune.yaml: initializer_words: "
        '["sculpture"]; ours is None because ids of words are the tokenizer\'s',
    ),
}

FREE: Free = {}


@pytest.mark.parametrize(("method", "option", "row"), rows(HELD, FREE))
def test_default(method: str, option: str, row: Any) -> None:
    assert_as_said(method, option, row)
