"""Tiny hosts with random weights: 89 surveyed architectures of transformers, timm and diffusers, and some more for
odd layouts.

`build(name)` returns the model in evaluation mode and example inputs. Nothing is downloaded.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("diffusers")

import diffusers
import timm
import transformers

Built = tuple[nn.Module, dict[str, Any]]
Builder = Callable[[], Built]

VOCABULARY = 99
SURVEY: dict[str, Builder] = {}
"""The hosts whose roles are known by hand (`host_truth.TRUTH`)."""
EXTRA: dict[str, Builder] = {}
"""Hosts with row orders that no surveyed host has."""


def build(name: str, seed: int = 0) -> Built:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model, inputs = (SURVEY | EXTRA)[name]()
    return model.eval(), inputs


def ids(rows: int = 2, length: int = 10) -> Tensor:
    return torch.randint(5, VOCABULARY - 1, (rows, length))


def image(rows: int = 2, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(rows, channels, size, size)


def without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


# transformers: decoders

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def causal(
    name: str, family: str, drop: str = "", into: dict[str, Builder] = SURVEY, model: str = "", **options: Any
) -> None:
    def builder() -> Built:
        config = getattr(transformers, f"{family}Config")(**{**without(DECODER, *drop.split()), **options})
        host = getattr(transformers, model or f"{family.removesuffix('Text')}ForCausalLM")(config)
        return host, {"input_ids": ids(), "attention_mask": torch.ones(2, 10, dtype=torch.long)}

    into[name] = builder


causal("llama", "Llama", head_dim=16)
causal("mistral", "Mistral", head_dim=16)
causal("qwen2", "Qwen2", tie_word_embeddings=True)
causal("qwen3", "Qwen3", head_dim=16)
causal(
    "qwen3_moe",
    "Qwen3Moe",
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    mlp_only_layers=[1],
)
causal("gemma2", "Gemma2", head_dim=16)
causal("gemma3_text", "Gemma3Text", head_dim=16, sliding_window=8)
causal("phi", "Phi")
causal("phi3", "Phi3")
causal("gpt_neox", "GPTNeoX", drop="num_key_value_heads")
FALCON = "num_key_value_heads intermediate_size"
causal(
    "falcon_old",
    "Falcon",
    drop=FALCON,
    multi_query=False,
    new_decoder_architecture=False,
    parallel_attn=False,
    alibi=True,
    bias=True,
)
causal("falcon_mq", "Falcon", drop=FALCON, multi_query=True, new_decoder_architecture=False, parallel_attn=True)
causal("falcon_new", "Falcon", drop=FALCON, num_kv_heads=2, new_decoder_architecture=True)
causal("bloom", "Bloom", drop=f"{FALCON} num_attention_heads num_hidden_layers", n_head=4, n_layer=2)
causal("opt", "OPT", drop=FALCON, ffn_dim=80, word_embed_proj_dim=24)
causal(
    "mpt",
    "Mpt",
    drop=f"{FALCON} hidden_size num_attention_heads num_hidden_layers max_position_embeddings",
    d_model=48,
    n_heads=4,
    n_layers=2,
    max_seq_len=64,
    expansion_ratio=2,
)
causal("mixtral", "Mixtral", num_local_experts=4, head_dim=16)
LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
causal("deepseek_v2", "DeepseekV2", **LATENT, q_lora_rank=20)
causal("deepseek_v2_lite", "DeepseekV2", **LATENT, q_lora_rank=None)
causal("deepseek_v3", "DeepseekV3", **LATENT, q_lora_rank=20)
causal("olmo2", "Olmo2")
MAMBA = "intermediate_size num_attention_heads num_key_value_heads max_position_embeddings"
causal("mamba", "Mamba", drop=MAMBA, state_size=8)
causal("mamba2", "Mamba2", drop=MAMBA, state_size=8, num_heads=6, head_dim=16, n_groups=1, chunk_size=4)
HYBRID = {"mamba_d_state": 8, "mamba_dt_rank": 6, "use_mamba_kernels": False, "attn_layer_offset": 1}
causal(
    "jamba",
    "Jamba",
    num_experts=4,
    num_experts_per_tok=2,
    attn_layer_period=2,
    expert_layer_period=2,
    expert_layer_offset=1,
    num_hidden_layers=4,
    **HYBRID,
)
causal(
    "zamba",
    "Zamba",
    num_hidden_layers=6,
    attn_layer_period=3,
    n_mamba_heads=2,
    num_key_value_heads=4,
    **{**HYBRID, "attn_layer_offset": 2},
)


def gpt2(cross: bool) -> Built:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        add_cross_attention=cross,
    )
    inputs: dict[str, Any] = {"input_ids": ids()}
    if cross:
        inputs["encoder_hidden_states"] = torch.randn(2, 5, 48)
    return transformers.GPT2LMHeadModel(config), inputs


def gpt_neo() -> Built:
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        hidden_size=48,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        intermediate_size=80,
        window_size=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPTNeoForCausalLM(config), {"input_ids": ids()}


def gptj() -> Built:
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=48,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPTJForCausalLM(config), {"input_ids": ids()}


SURVEY["gpt2"] = lambda: gpt2(cross=False)
SURVEY["gpt2_cross"] = lambda: gpt2(cross=True)
SURVEY["gpt_neo"] = gpt_neo
SURVEY["gptj"] = gptj

# transformers: encoders

ENCODER = without(DECODER, "num_key_value_heads", "bos_token_id", "eos_token_id")


def encoder(
    name: str, family: str, task: str = "MaskedLM", drop: str = "", cross: bool = False, **options: Any
) -> None:
    def builder() -> Built:
        config = getattr(transformers, f"{family}Config")(**{**without(ENCODER, *drop.split()), **options})
        inputs = {"input_ids": ids(), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
        if cross:
            inputs["encoder_hidden_states"] = torch.randn(2, 5, 48)
        return getattr(transformers, f"{family}{task}")(config), inputs

    SURVEY[name] = builder


encoder("bert", "Bert", "ForMaskedLM")
encoder("bert_cls", "Bert", "ForSequenceClassification")
encoder("bert_decoder", "Bert", "LMHeadModel", cross=True, is_decoder=True, add_cross_attention=True)
encoder("roberta", "Roberta", "ForMaskedLM")
encoder(
    "distilbert",
    "DistilBert",
    "ForMaskedLM",
    drop="hidden_size intermediate_size num_hidden_layers num_attention_heads",
    dim=48,
    hidden_dim=80,
    n_layers=2,
    n_heads=4,
)
encoder("albert", "Albert", "ForMaskedLM", embedding_size=24, num_hidden_layers=4)
encoder("electra", "Electra", "ForMaskedLM", embedding_size=24)
encoder(
    "deberta_v2",
    "DebertaV2",
    "ForMaskedLM",
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    share_att_key=False,
    conv_kernel_size=3,
    conv_act="gelu",
    norm_rel_ebd="layer_norm",
)
encoder("modernbert", "ModernBert", "ForMaskedLM", cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)

# transformers: encoder-decoders and speech

T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def sequence_to_sequence(name: str, family: str, **options: Any) -> None:
    def builder() -> Built:
        config = getattr(transformers, f"{family}Config")(**options)
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        return model, {"input_ids": ids(), "decoder_input_ids": ids(2, 6)}

    SURVEY[name] = builder


sequence_to_sequence("t5", "T5", **T5)
sequence_to_sequence("t5_gated", "T5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
sequence_to_sequence("mt5", "MT5", **T5)
sequence_to_sequence("bart", "Bart", **BART)
sequence_to_sequence("mbart", "MBart", **BART)


def whisper() -> Built:
    options = without(BART, "max_position_embeddings")
    sizes = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32, "decoder_start_token_id": 3}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**{**options, **sizes}))
    return model, {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids(2, 6)}


def wav2vec2(**options: Any) -> Built:
    config = transformers.Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        conv_dim=(16, 16),
        conv_stride=(4, 4),
        conv_kernel=(8, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        pad_token_id=0,
        **options,
    )
    return transformers.Wav2Vec2ForCTC(config), {"input_values": torch.randn(2, 400)}


SURVEY["whisper"] = whisper
SURVEY["wav2vec2"] = wav2vec2
SURVEY["wav2vec2_stable"] = lambda: wav2vec2(do_stable_layer_norm=True, feat_extract_norm="layer")

# transformers: vision and multimodal

CLIP_TEXT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP_VISION = {**CLIP_TEXT, "hidden_size": 56, "intermediate_size": 88, "image_size": 32, "patch_size": 8}
VIT = {**CLIP_TEXT, "image_size": 32, "patch_size": 8}


def clip() -> Built:
    text = {**CLIP_TEXT, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=CLIP_VISION, projection_dim=24)
    return transformers.CLIPModel(config), {"input_ids": ids(), "pixel_values": image()}


def siglip() -> Built:
    sizes = {"hidden_size": 56, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "projection_size": 56}
    config = transformers.SiglipConfig(text_config={**CLIP_TEXT, **sizes}, vision_config=CLIP_VISION)
    return transformers.SiglipModel(config), {"input_ids": ids(), "pixel_values": image()}


def classifier(name: str, family: str, **options: Any) -> None:
    def builder() -> Built:
        config = getattr(transformers, f"{family}Config")(**options, num_labels=7)
        return getattr(transformers, f"{family}ForImageClassification")(config), {"pixel_values": image()}

    SURVEY[name] = builder


SURVEY["clip"] = clip
SURVEY["siglip"] = siglip
classifier("vit", "ViT", **VIT)
classifier("dinov2", "Dinov2", **without(VIT, "intermediate_size"), mlp_ratio=2)
classifier("dinov2_swiglu", "Dinov2", **without(VIT, "intermediate_size"), mlp_ratio=2, use_swiglu_ffn=True)
classifier("swin", "Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
classifier("convnext", "ConvNext", num_stages=3, hidden_sizes=[8, 16, 24], depths=[2, 2, 2])


def detr() -> Built:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = without(BART, "vocab_size", "max_position_embeddings", *(name for name in BART if name.endswith("_id")))
    config = transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        num_queries=5,
        num_labels=7,
        **sizes,
    )
    return transformers.DetrForObjectDetection(config), {"pixel_values": image(2, 3, 64)}


def sam() -> Built:
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 48,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "window_size": 2,
            "global_attn_indexes": [1],
            "mlp_dim": 80,
            "num_pos_feats": 16,
            "initializer_range": 0.02,  # the class's own of 1e-10 drowns in the eps of the norms behind it
        },
        prompt_encoder_config={
            "hidden_size": 32,
            "image_size": 32,
            "patch_size": 8,
            "mask_input_channels": 4,
            "num_point_embeddings": 4,
        },
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "attention_downsample_rate": 2,
            "num_multimask_outputs": 3,
            "iou_head_depth": 3,
            "iou_head_hidden_dim": 32,
        },
    )
    prompts = {"input_points": torch.tensor([[[[5.0, 6.0]]]]), "input_boxes": torch.tensor([[[3.0, 4.0, 9.0, 8.0]]])}
    return transformers.SamModel(config), {"pixel_values": image(1), **prompts, "input_masks": image(1, 1, 16)}


def with_image_tokens(token: int, count: int) -> Tensor:
    text = ids(1) % 90
    return torch.cat([text[:, :3], torch.full((1, count), token), text[:, 3:]], 1)


def llava() -> Built:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**DECODER, head_dim=16),
        vision_config=transformers.CLIPVisionConfig(**CLIP_VISION),
        image_token_index=98,
        vision_feature_layer=-2,
    )
    tokens = with_image_tokens(98, 16)
    inputs = {"input_ids": tokens, "pixel_values": image(1), "attention_mask": torch.ones_like(tokens)}
    return transformers.LlavaForConditionalGeneration(config), inputs


def gemma3() -> Built:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**DECODER, head_dim=16),
        vision_config=transformers.SiglipVisionConfig(**CLIP_VISION),
        mm_tokens_per_image=4,
        image_token_id=98,
        image_token_index=98,
        boi_token_index=97,
        eoi_token_index=96,
    )
    tokens = with_image_tokens(98, 4)
    inputs = {
        "input_ids": tokens,
        "pixel_values": image(1),
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": (tokens == 98).long(),
    }
    return transformers.Gemma3ForConditionalGeneration(config), inputs


def qwen2_vl() -> Built:
    rotary = {"type": "mrope", "mrope_section": [2, 2, 2], "rope_type": "default", "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        text_config={**DECODER, "rope_scaling": rotary},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 48,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
        image_token_id=97,
        video_token_id=96,
        vision_start_token_id=95,
        vision_end_token_id=94,
    )
    text, start, end = ids(1) % 90, torch.tensor([[95]]), torch.tensor([[94]])
    tokens = torch.cat([text[:, :3], start, torch.full((1, 4), 97), end, text[:, 3:]], 1)
    inputs = {
        "input_ids": tokens,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == 97).long(),
    }
    return transformers.Qwen2VLForConditionalGeneration(config), inputs


SURVEY["detr"] = detr
SURVEY["sam"] = sam
SURVEY["llava"] = llava
SURVEY["qwen2_vl"] = qwen2_vl
SURVEY["gemma3"] = gemma3

# timm


def pytorch_image_model(
    name: str, architecture: str, size: int = 32, into: dict[str, Builder] = SURVEY, **options: Any
) -> None:
    def builder() -> Built:
        model = timm.create_model(architecture, pretrained=False, num_classes=7, **options)
        return model, {"x": image(2, 3, size)}

    into[f"timm_{name}"] = builder


TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
TIMM_SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
pytorch_image_model("vit", "vit_tiny_patch16_224", **TIMM_VIT)
pytorch_image_model("vit_qknorm_ls", "vit_tiny_patch16_224", qk_norm=True, init_values=1e-5, **TIMM_VIT)
pytorch_image_model("deit_dist", "deit_tiny_distilled_patch16_224", **TIMM_VIT)
pytorch_image_model("beit", "beit_base_patch16_224", **TIMM_VIT)
pytorch_image_model("eva02", "eva02_tiny_patch14_224", **TIMM_VIT)
pytorch_image_model("eva02_base", "eva02_base_patch14_224", **TIMM_VIT)
pytorch_image_model("swin", "swin_tiny_patch4_window7_224", **TIMM_SWIN)
pytorch_image_model("swinv2", "swinv2_tiny_window8_256", **TIMM_SWIN)
pytorch_image_model("convnext", "convnext_atto", 64, dims=(8, 16, 24, 32), depths=(2, 2, 2, 2))
pytorch_image_model("resnet18", "resnet18", 64, channels=(16, 32, 48, 64))
pytorch_image_model("resnet50", "resnet50", 64, channels=(16, 32, 48, 64))
pytorch_image_model("mobilenetv3", "mobilenetv3_small_050", 64)
pytorch_image_model("efficientnet", "efficientnet_b0", 64)
SURVEY["timm_mixer"] = lambda: (
    timm.models.MlpMixer(num_classes=7, img_size=64, patch_size=16, num_blocks=2, embed_dim=48),
    {"x": image(2, 3, 64)},
)
pytorch_image_model("maxvit", "maxvit_rmlp_pico_rw_256", 64, img_size=64)
pytorch_image_model("maxvit_tf", "maxvit_tiny_tf_224", 64, img_size=64)
pytorch_image_model("levit", "levit_128s", 224)
pytorch_image_model("regnet", "regnety_002", 64)

# diffusers

UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 40,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
}
DIT = {"num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2}


def steps() -> Tensor:
    return torch.tensor([3, 5])


def unet2d() -> Built:
    model = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return model, {"sample": image(2, 3, 16), "timestep": steps()}


def unet_inputs() -> dict[str, Any]:
    return {"sample": image(2, 4, 16), "timestep": steps(), "encoder_hidden_states": torch.randn(2, 7, 40)}


def sd15_unet() -> Built:
    model = diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **UNET,
    )
    return model, unet_inputs()


def sdxl_unet() -> Built:
    model = diffusers.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        **{**UNET, "attention_head_dim": (2, 4)},
    )
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)}
    return model, {**unet_inputs(), "added_cond_kwargs": added}


def controlnet() -> Built:
    model = diffusers.ControlNetModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(8, 16),
        **without(UNET, "sample_size", "out_channels"),
    )
    return model, {**unet_inputs(), "controlnet_cond": image(2, 3, 32)}


def sd3() -> Built:
    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        joint_attention_dim=40,
        caption_projection_dim=48,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **{**DIT, "num_layers": 3},
    )
    inputs = {
        "hidden_states": image(2, 4, 16),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "pooled_projections": torch.randn(2, 24),
        "timestep": steps(),
    }
    return model, inputs


def flux() -> Built:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        num_single_layers=2,
        joint_attention_dim=40,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
        **{**DIT, "in_channels": 16},
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "pooled_projections": torch.randn(2, 24),
        "timestep": torch.tensor([0.3, 0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.ones(2),
    }
    return model, inputs


def pixart() -> Built:
    model = diffusers.PixArtTransformer2DModel(
        out_channels=8,
        cross_attention_dim=48,
        sample_size=16,
        patch_size=2,
        caption_channels=40,
        norm_type="ada_norm_single",
        **DIT,
    )
    inputs = {
        "hidden_states": image(2, 4, 16),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "timestep": steps(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


def dit() -> Built:
    model = diffusers.DiTTransformer2DModel(
        out_channels=8,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        **DIT,
    )
    return model, {"hidden_states": image(2, 4, 16), "timestep": steps(), "class_labels": torch.tensor([1, 2])}


def wan(**options: Any) -> Built:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        out_channels=4,
        text_dim=40,
        freq_dim=16,
        ffn_dim=80,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **DIT,
        **options,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 512 if options else 7, 40),
    }
    if options:
        inputs["encoder_hidden_states_image"] = torch.randn(1, 5, 24)
    return model, inputs


def hunyuan_video() -> Built:
    model = diffusers.HunyuanVideoTransformer3DModel(
        out_channels=4,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=40,
        pooled_projection_dim=24,
        rope_axes_dim=(4, 6, 6),
        **{**DIT, "num_layers": 1},
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 7, 40),
        "encoder_attention_mask": torch.ones(1, 7),
        "pooled_projections": torch.randn(1, 24),
        "guidance": torch.tensor([6.0]),
    }
    return model, inputs


SURVEY["unet2d"] = unet2d
SURVEY["sd15_unet"] = sd15_unet
SURVEY["sdxl_unet"] = sdxl_unet
SURVEY["sd3"] = sd3
SURVEY["flux"] = flux
SURVEY["pixart"] = pixart
SURVEY["dit"] = dit
SURVEY["vae_kl"] = lambda: (diffusers.AutoencoderKL(**AUTOENCODER), {"sample": image(2, 3, 16)})
SURVEY["controlnet"] = controlnet
SURVEY["vq"] = lambda: (diffusers.VQModel(**AUTOENCODER, num_vq_embeddings=16), {"sample": image(2, 3, 16)})
SURVEY["wan"] = wan
SURVEY["wan_i2v"] = lambda: wan(image_dim=24, added_kv_proj_dim=48)
SURVEY["hunyuan_video"] = hunyuan_video

# Odd layouts beyond the survey

GPT = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4}
GPT_NAMES = " ".join(name for name in DECODER if not name.endswith("_id"))
causal("codegen", "CodeGen", drop=GPT_NAMES, into=EXTRA, rotary_dim=4, **GPT)
causal("bigcode_mq", "GPTBigCode", drop=GPT_NAMES, into=EXTRA, multi_query=True, **GPT)
causal("bigcode_mha", "GPTBigCode", drop=GPT_NAMES, into=EXTRA, multi_query=False, **GPT)
causal("persimmon", "Persimmon", drop="num_key_value_heads", into=EXTRA)
causal("glm4", "Glm4", into=EXTRA, head_dim=16)
causal("gpt_oss", "GptOss", into=EXTRA, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
causal("llama4", "Llama4Text", model="Llama4ForCausalLM", into=EXTRA, head_dim=16, num_local_experts=4, moe_layers=[0])
causal(
    "qwen2_moe",
    "Qwen2Moe",
    into=EXTRA,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=32,
)
pytorch_image_model("tiny_vit", "tiny_vit_5m_224", 224, into=EXTRA)
pytorch_image_model("gcvit", "gcvit_xxtiny", 224, into=EXTRA)


def xlnet() -> Built:
    config = transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=48, n_layer=2, n_head=4, d_inner=80)
    return transformers.XLNetLMHeadModel(config), {"input_ids": ids()}


def switch() -> Built:
    options = {**T5, "num_experts": 4, "expert_capacity": 8, "num_sparse_encoder_layers": 1}
    config = transformers.SwitchTransformersConfig(**options, num_sparse_decoder_layers=1)
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    return model, {"input_ids": ids(), "decoder_input_ids": ids(2, 6)}


EXTRA["xlnet"] = xlnet
EXTRA["switch"] = switch
