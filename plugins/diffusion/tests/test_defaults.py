"""Defaults of diffusion methods, and what fixes them."""

from typing import Any

import pytest
from named_defaults import Free, Held, assert_as_said, rows

CONTROLNET = "lllyasviel/ControlNet@ed85cd1"
CONTROL_LORA = "huggingface/diffusers@00a26cd, examples/research_projects/control_lora/control_lora.py"
CONTROLNEXT = "dvlab-research/ControlNeXt@ab4b3ac, ControlNeXt-SD1.5-Training"
XS = "vislearn/ControlNet-XS@8d90ed4"
LLLITE = "kohya-ss/sd-scripts@48d368f, networks/control_net_lllite.py"
MIX = "TencentARC/Mix-of-Show@51270fd"
POTTER = f"{MIX}, options/train/EDLoRA/real/8101_EDLoRA_potter_Cmix_B4_Repeat500.yml"
DIFFFIT = "mkshing/DiffFit-pytorch@78dc2d1, difffit_pytorch"
HYPERNETWORK = "modules/hypernetworks/hypernetwork.py"
WEBUI = "AUTOMATIC1111/stable-diffusion-webui"
LYCORIS = "KohakuBlueleaf/LyCORIS@f49d30d"
LOCON = "cyber-meow/LyCORIS-evaluation@7c5758c, exp_configs/training_configs/exp-1004-sd15-lora8a4-full-a.toml"
OMINI = "Yuanshi9815/OminiControl@331dd34"
TLORA = "ControlGenAI/T-LoRA@602c4f7"
SCEPTER = "modelscope/scepter@9f5b439, scepter"
PERFUSION = "lucidrains/perfusion-pytorch@9032150, perfusion_pytorch/perfusion.py"
T2I = "TencentARC/T2I-Adapter"
KOHAKU = "KohakuBlueleaf/HyperKohaku@7651313, modules/lightlora.py"
MFACE = "MFaceTech/HyperDreamBooth@25a4312, modules/light_lora.py"

HELD: Held = {
    ("controlnet", "scale"): (1.0, f"{CONTROLNET}, cldm/cldm.py: self.control_scales = [1.0] * 13"),
    ("controlnet", "guess_mode"): (
        False,
        f"{CONTROLNET}, gradio_canny2image.py: gr.Checkbox(label='Guess Mode', value=False)",
    ),
    ("controlnet", "channels"): (3, f"{CONTROLNET}, models/cldm_v15.yaml: hint_channels: 3"),
    ("controlnet_lllite", "scale"): (1.0, f"{LLLITE}: multiplier: Optional[float] = 1.0"),
    ("controlnet_lllite", "condition_dim"): (16, f"{LLLITE}: cond_emb_dim: int = 16"),
    ("controlnet_lllite", "hidden"): (16, f"{LLLITE}: mlp_dim: int = 16"),
    ("controlnet_lllite", "channels"): (3, f"{LLLITE}: Conv2d(3, cond_emb_dim // 2, kernel_size=4, stride=4)"),
    ("controlnet_lllite", "dropout"): (0.0, f"{LLLITE}: dropout: Optional[float] = None"),
    ("controlnet_lora", "rank"): (128, f"{CONTROL_LORA}: control-LoRAs-rank128/control-lora-canny-rank128.safetensors"),
    ("controlnet_lora", "vectors"): (
        True,
        "Stability-AI/stability-ComfyUI-nodes@4c7d55a, control_lora_create.py: up and down if len(model_weight.shape) "
        ">= 2, else output_sd[ck] = c[ck]",
    ),
    ("controlnet_lora", "scale"): (1.0, f"{CONTROL_LORA}: controlnet_conditioning_scale = 1.0"),
    ("controlnet_lora", "guess_mode"): (
        False,
        "huggingface/diffusers@00a26cd, controlnet.py: guess_mode: bool = False",
    ),
    ("controlnet_lora", "channels"): (
        3,
        f"{CONTROL_LORA}: np.concatenate([image, image, image], axis=2)",
    ),
    ("controlnet_lora", "widths"): (
        [16, 32, 96, 256],
        "huggingface/diffusers@00a26cd, controlnet.py: conditioning_embedding_out_channels = (16, 32, 96, 256)",
    ),
    ("controlnext", "scale"): (1.0, f"{CONTROLNEXT}/train_controlnext.py: --controlnext_scale default=1.0"),
    ("controlnext", "before"): (False, f"{CONTROLNEXT}/models/unet.py: if down_idx == 0, behind the block"),
    ("controlnext", "base"): ("attention", f'{CONTROLNEXT}/train_controlnext.py: if "to_out" in name'),
    ("controlnext", "channels"): (3, f"{CONTROLNEXT}/models/controlnext.py: nn.Conv2d(3, 64, kernel_size=3, ...)"),
    ("controlnext", "widths"): ([64, 128, 256], f"{CONTROLNEXT}/models/controlnext.py: out_channels = [128, 256]"),
    ("controlnext", "control_rate"): (10.0, f'{CONTROLNEXT}/train_controlnext.py: "lr": args.learning_rate * 10'),
    ("controlnet_xs", "scale"): (1.0, f"{XS}, ldm/modules/diffusionmodules/twoStreamControl.py: control_scale = 1.0"),
    ("controlnet_xs", "ratio"): (0.2, f"{XS}, configs/training/sd/sd15_encD_canny_53m.yaml: control_model_ratio: 0.2"),
    ("controlnet_xs", "heads"): (
        None,
        f"{XS}, configs/training/sd/sd15_encD_canny_53m.yaml: num_heads: 8, as in the UNet below it",
    ),
    ("controlnet_xs", "channels"): (3, f"{XS}, configs/training/sd/sd15_encD_canny_53m.yaml: hint_channels: 3"),
    ("controlnet_xs", "widths"): (
        [16, 32, 96, 256],
        f"{XS}, ldm/modules/diffusionmodules/twoStreamControl.py: input_hint_block of 16, 32, 96 and 256",
    ),
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
    ("ed_lora", "rank"): (4, f"{POTTER}: rank: 4"),
    ("ed_lora", "alpha"): (1.0, f"{POTTER}: alpha: 1.0"),
    ("ed_lora", "random_std"): (0.013, f"{POTTER}: initializer_token: <rand-0.013>+man"),
    ("ed_lora", "initializer"): (
        None,
        f"{POTTER}: initializer_token: <rand-0.013>+man; ours is None because ids of words are the tokenizer's",
    ),
    ("ed_lora", "word_lr"): (1e-3, f"{POTTER}: text_embedding: lr: !!float 1e-3"),
    ("hypernetwork_a1111", "scale"): (1.0, f"{WEBUI}@3157fe2, {HYPERNETWORK}: self.multiplier = 1.0"),
    ("hypernetwork_a1111", "structure"): (
        [1.0, 2.0, 1.0],
        f"{WEBUI}@3157fe2, {HYPERNETWORK}: state_dict.get('layer_structure', [1, 2, 1])",
    ),
    ("hypernetwork_a1111", "activation"): (
        "linear",
        f'{WEBUI}@7c8a4cc, modules/ui.py: value="linear", label="Select activation function of hypernetwork..."',
    ),
    ("hypernetwork_a1111", "activate_output"): (False, f"{WEBUI}@3157fe2, {HYPERNETWORK}: activate_output=False"),
    ("hypernetwork_a1111", "norm"): (False, f"{WEBUI}@3157fe2, {HYPERNETWORK}: add_layer_norm=False"),
    ("hypernetwork_a1111", "dropout"): (0.0, f"{WEBUI}@3157fe2, {HYPERNETWORK}: use_dropout=False"),
    ("hypernetwork_a1111", "start"): ("normal", f"{WEBUI}@3157fe2, {HYPERNETWORK}: weight_init='Normal'"),
    ("ip_adapter", "scale"): (1.0, "tencent-ailab/IP-Adapter@62e4af9, ip_adapter/attention_processor.py: scale=1.0"),
    ("ip_adapter", "tokens"): (4, "tencent-ailab/IP-Adapter@62e4af9, ip_adapter/attention_processor.py: num_tokens=4"),
    ("lidb", "rank"): (1, "arXiv 2307.06949, Lightweight DreamBooth: r = 1"),
    ("lidb", "alpha"): (None, f"{MFACE}: network_alpha=None, which is a scale of 1"),
    ("lidb", "a"): (100, f"{KOHAKU}: down_dim=100, as in arXiv 2307.06949"),
    ("lidb", "b"): (50, f"{KOHAKU}: up_dim=50, as in arXiv 2307.06949"),
    ("locon", "rank"): (16, f"{LYCORIS}, example_configs/training_configs/kohya/lora_config.toml: network_dim = 16"),
    ("locon", "alpha"): (8.0, f"{LYCORIS}, example_configs/training_configs/kohya/lora_config.toml: network_alpha = 8"),
    ("locon", "conv_rank"): (8, f"{LOCON}: conv_dim=8, the paper's; also in {LYCORIS}, docs/Demo.md: (16,8) for LoCon"),
    ("locon", "conv_alpha"): (
        1.0,
        f"{LOCON}: conv_alpha=4; ours is 1.0, as that of LycorisNetworkKohya in lycoris/kohya.py",
    ),
    ("ominicontrol", "rank"): (4, f"{OMINI}, train/config/spatial_alignment.yaml: r: 4"),
    ("ominicontrol", "position_delta"): ((0, 0), f"{OMINI}, omini/train_flux/trainer.py: get(..., [[0, 0]])"),
    ("ominicontrol", "position_scale"): (1.0, f"{OMINI}, omini/pipeline/flux_omini.py: position_scale=1.0"),
    ("ominicontrol", "independent"): (
        False,
        f"{OMINI}, train/config/spatial_alignment.yaml: independent_condition: false",
    ),
    ("perfusion", "beta"): (0.75, f"{PERFUSION}: train_beta = 0.75"),
    ("perfusion", "tau"): (0.1, f"{PERFUSION}: train_temperature = 0.1"),
    ("perfusion", "beta_eval"): (0.7, f"{PERFUSION}: eval_beta = 0.70"),
    ("perfusion", "tau_eval"): (0.15, f"{PERFUSION}: eval_temperature = 0.15"),
    ("perfusion", "ema"): (0.99, f"{PERFUSION}: input_decay = 0.99"),
    ("perfusion", "text_gradient"): (0.1, f"{PERFUSION}: frac_gradient_concept_embed = 0.1"),
    ("perfusion", "initializer"): (
        None,
        "lucidrains/perfusion-pytorch@9032150, perfusion_pytorch/embedding.py: superclass_embed_id = None",
    ),
    ("scedit", "ratio"): (1.0, f"{SCEPTER}/methods/scedit/t2i/sd15_512_sce_t2i.yaml: DOWN_RATIO: 1.0"),
    ("scedit", "scale"): (1.0, f"{SCEPTER}/methods/scedit/ctr/sd15_512_sce_ctr_hed.yaml: SCALE: 1.0"),
    ("scedit", "channels"): (
        None,
        f"{SCEPTER}/methods/scedit/t2i/sd15_512_sce_t2i.yaml: NAME: LatentDiffusionSCETuning, which has no image",
    ),
    ("scedit", "widths"): (
        [16, 32, 96, 256],
        f"{SCEPTER}/modules/model/tuner/sce/scetuning.py: 16, 32, 96 times pre_hint_dim_ratio; in methods/scedit/ctr/"
        "sd15_512_sce_ctr_hed.yaml PRE_HINT_OUT_CHANNELS: 256",
    ),
    ("scedit", "kernel"): (
        3,
        f"{SCEPTER}/methods/scedit/ctr/sd15_512_sce_ctr_hed.yaml: DENSE_HINT_KERNAL: 3; the paper's 7.9 % of "
        "ControlNet's parameters are those of 1",
    ),
    ("svdiff", "scale"): (1.0, "mkshing/svdiff-pytorch@a78f69e, inference.py: --spectral_shifts_scale default=1.0"),
    ("svdiff", "vector_lr"): (1e-6, "mkshing/svdiff-pytorch@a78f69e, README.md: --learning_rate_1d=1e-6"),
    ("t2i_adapter", "scale"): (1.0, f"{T2I}@c408b05, Adapter/inference_base.py: --cond_weight default=1.0"),
    ("t2i_adapter", "channels"): (3, f"{T2I}@16bba67, train_depth.py: cin=3 * 64"),
    ("t2i_adapter", "blocks"): (2, f"{T2I}@16bba67, train_depth.py: nums_rb=2"),
    ("tlora", "rank"): (64, f"{TLORA}, README.md: --lora_rank=64"),
    ("tlora", "min_rank"): (32, f"{TLORA}, README.md: --min_rank=32"),
    ("tlora", "alpha"): (None, f"{TLORA}, tlora/model/lora.py: scale=1.0"),
    ("tlora", "power"): (1.0, f"{TLORA}, train.py: --alpha_rank_scale default=1.0"),
    ("tlora", "timesteps"): (
        1000.0,
        f"{TLORA}, tlora/trainer_sdxl.py: max_timestep=self.scheduler.num_train_timesteps, which is 1000 in SDXL",
    ),
    ("tlora", "start"): ("random", f'{TLORA}, README.md: --trainer_type="ortho_lora"'),
    ("tlora", "part"): ("last", f'{TLORA}, README.md: --sig_type="last"'),
    ("textual_inversion", "initializer"): (
        None,
        "rinongal/textual_inversion@424192d, configs/latent-diffusion/txt2img-1p4B-finetune.yaml: initializer_words: "
        '["sculpture"]; ours is None because ids of words are the tokenizer\'s',
    ),
    ("xti", "initializer"): (
        None,
        'mkshing/prompt-plus-pytorch@7862c3f, README.md: --initializer_token="toy"; ours is None because ids of words '
        "are the tokenizer's",
    ),
}

FREE: Free = {
    ("perfusion", "damping"): "none there, where C is of 100,000 captions; it moves no eigenvalue of that by 2 %",
}


@pytest.mark.parametrize(("method", "option", "row"), rows(HELD, FREE))
def test_default(method: str, option: str, row: Any) -> None:
    assert_as_said(method, option, row)
