"""More tiny hosts with random weights, for what has to work on any architecture: those of which nobody has written down
the roles. `NAMED` are further architectures of the survey of hosts, `OTHERS` thirty that it does not have.

`build(name)` returns the model in evaluation mode and example inputs, also of hosts of `host_zoo`. Nothing is
downloaded.
"""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import host_zoo
import torch
import transformers
from host_zoo import (
    BART,
    CLIP_TEXT,
    DIT,
    ENCODER,
    MAMBA,
    VOCABULARY,
    Builder,
    Built,
    causal,
    ids,
    image,
    pytorch_image_model,
    steps,
    without,
)

NAMED: dict[str, Builder] = {}
OTHERS: dict[str, Builder] = {}

# transformers: decoders

causal("cohere", "Cohere", into=NAMED)
causal("exaone4", "Exaone4", into=NAMED, head_dim=16, sliding_window=8, layer_types=["full_attention"] * 2)
causal("granite_moe", "GraniteMoe", into=NAMED, num_local_experts=4, num_experts_per_tok=2)
causal("olmoe", "Olmoe", into=NAMED, num_experts=4, num_experts_per_tok=2)
causal("phimoe", "Phimoe", into=NAMED, num_local_experts=4, num_experts_per_tok=2)
causal("jetmoe", "JetMoe", into=NAMED, kv_channels=12, num_local_experts=4, num_experts_per_tok=2)
causal(
    "minimax",
    "MiniMax",
    into=NAMED,
    head_dim=16,
    num_local_experts=4,
    layer_types=["full_attention", "linear_attention"],
)
causal(
    "qwen3_next",
    "Qwen3Next",
    into=NAMED,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=12,
    linear_value_head_dim=12,
    layer_types=["linear_attention", "full_attention"],
)
causal(
    "bamba",
    "Bamba",
    into=NAMED,
    attn_layer_indices=[1],
    mamba_n_heads=6,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_d_state=8,
)
causal(
    "nemotron_h",
    "NemotronH",
    into=NAMED,
    head_dim=12,
    mamba_num_heads=6,
    mamba_head_dim=16,
    n_groups=1,
    ssm_state_size=8,
    layers_block_type=["mamba", "attention", "moe"],
    n_routed_experts=4,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=24,
)
causal("lfm2", "Lfm2", into=NAMED, layer_types=["conv", "full_attention"])
causal(
    "xglm",
    "XGLM",
    drop="intermediate_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads",
    into=NAMED,
    d_model=48,
    ffn_dim=80,
    num_layers=2,
    attention_heads=4,
)
causal(
    "rwkv",
    "Rwkv",
    drop="num_attention_heads num_key_value_heads max_position_embeddings",
    into=NAMED,
    attention_hidden_size=48,
)


def dbrx() -> Built:
    config = transformers.DbrxConfig(
        d_model=48,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=VOCABULARY,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 48},
    )
    return transformers.DbrxForCausalLM(config), {"input_ids": ids()}


NAMED["dbrx"] = dbrx

causal("falcon_mamba", "FalconMamba", drop=MAMBA, into=OTHERS, state_size=8)
causal(
    "recurrent_gemma",
    "RecurrentGemma",
    into=OTHERS,
    head_dim=12,
    lru_width=48,
    block_types=["recurrent", "attention"],
    attention_window_size=8,
)
causal("stablelm", "StableLm", into=OTHERS, partial_rotary_factor=0.5)
causal("starcoder2", "Starcoder2", into=OTHERS)
causal("biogpt", "BioGpt", drop="num_key_value_heads", into=OTHERS)

# transformers: encoders


def encoder(
    name: str, family: str, into: dict[str, Builder], task: str = "ForMaskedLM", drop: str = "", **options: Any
) -> None:
    def builder() -> Built:
        config = getattr(transformers, f"{family}Config")(**{**without(ENCODER, *drop.split()), **options})
        return getattr(transformers, f"{family}{task}")(config), {"input_ids": ids(2, 16)}

    into[name] = builder


encoder("longformer", "Longformer", NAMED, attention_window=[8, 8], sep_token_id=2, bos_token_id=1, eos_token_id=2)
encoder("big_bird", "BigBird", NAMED, attention_type="original_full")
encoder("roformer", "RoFormer", NAMED, embedding_size=48)
encoder("mpnet", "MPNet", NAMED)
encoder(
    "squeezebert",
    "SqueezeBert",
    NAMED,
    embedding_size=48,
    q_groups=2,
    k_groups=2,
    v_groups=2,
    post_attention_groups=1,
    intermediate_groups=2,
    output_groups=2,
)
encoder("ibert", "IBert", NAMED)
encoder(
    "funnel",
    "Funnel",
    NAMED,
    drop="hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings",
    d_model=48,
    n_head=4,
    d_head=12,
    d_inner=80,
    block_sizes=[1, 1],
)
encoder("mobilebert", "MobileBert", NAMED, embedding_size=24, intra_bottleneck_size=24, true_hidden_size=24)
encoder("esm", "Esm", NAMED, position_embedding_type="rotary", mask_token_id=4)
encoder("fnet", "FNet", NAMED, drop="num_attention_heads")
encoder("deberta", "Deberta", NAMED, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
encoder(
    "layoutlmv3",
    "LayoutLMv3",
    NAMED,
    task="ForTokenClassification",
    coordinate_size=8,
    shape_size=8,
    visual_embed=False,
    max_2d_position_embeddings=64,
    has_spatial_attention_bias=False,
    has_relative_attention_bias=False,
)


def speech(name: str, family: str, into: dict[str, Builder], **options: Any) -> None:
    def builder() -> Built:
        config = getattr(transformers, f"{family}Config")(
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
            **options,
        )
        return getattr(transformers, f"{family}ForCTC")(config), {"input_values": torch.randn(2, 400)}

    into[name] = builder


speech("wavlm", "WavLM", NAMED)
speech(
    "wav2vec2_conformer", "Wav2Vec2Conformer", NAMED, position_embeddings_type="rotary", conv_depthwise_kernel_size=7
)
speech("hubert", "Hubert", OTHERS)


def pair(
    name: str, family: str, into: dict[str, Builder], model: str = "ForConditionalGeneration", **options: Any
) -> None:
    def builder() -> Built:
        config = getattr(transformers, f"{family}Config")(**{**BART, **options})
        return getattr(transformers, f"{family}{model}")(config), {
            "input_ids": ids(2, 16),
            "decoder_input_ids": ids(2, 6),
        }

    into[name] = builder


pair("marian", "Marian", NAMED, "MTModel", decoder_start_token_id=0)
pair("m2m_100", "M2M100", NAMED)
pair(
    "led", "LED", NAMED, attention_window=[8, 8], max_encoder_position_embeddings=64, max_decoder_position_embeddings=64
)
pair("pegasus", "Pegasus", OTHERS)

# transformers: pictures and more

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def pictures(
    name: str,
    family: str,
    into: dict[str, Builder],
    size: int = 32,
    model: str = "ForImageClassification",
    **options: Any,
) -> None:
    def builder() -> Built:
        config = getattr(transformers, f"{family}Config")(**options)
        return getattr(transformers, f"{family}{model}")(config), {"pixel_values": image(2, 3, size)}

    into[name] = builder


pictures(
    "hiera",
    "Hiera",
    NAMED,
    embed_dim=24,
    depths=[1, 1],
    num_heads=[1, 2],
    image_size=[32, 32],
    query_stride=[2, 2],
    masked_unit_size=[4, 4],
    num_query_pool=1,
)
pictures("cvt", "Cvt", NAMED, embed_dim=[16, 24, 32], depth=[1, 2, 3], num_heads=[1, 2, 2])
pictures(
    "mobilevit",
    "MobileViT",
    NAMED,
    hidden_sizes=[24, 32, 40],
    neck_hidden_sizes=[8, 8, 12, 16, 16, 16, 24],
    size=128,
    image_size=128,
)
pictures(
    "dpt",
    "DPT",
    NAMED,
    model="ForDepthEstimation",
    **{**SIZES, "num_hidden_layers": 4},
    backbone_out_indices=[0, 1, 2, 3],
    neck_hidden_sizes=[8, 8, 8, 8],
    fusion_hidden_size=16,
    is_hybrid=False,
)
pictures("beit_hf", "Beit", OTHERS, **SIZES, use_absolute_position_embeddings=True, vocab_size=VOCABULARY)
pictures(
    "segformer",
    "Segformer",
    OTHERS,
    hidden_sizes=[8, 16, 24, 32],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 2, 2, 4],
    size=64,  # of 32 the last stage has one token, whose softmax learns nothing but rounding
)
pictures("resnet_hf", "ResNet", OTHERS, embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
pictures("poolformer_hf", "PoolFormer", OTHERS, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
pictures("mobilenet_v2_hf", "MobileNetV2", OTHERS, depth_multiplier=0.25)


def perceiver() -> Built:
    config = transformers.PerceiverConfig(
        num_latents=8,
        d_latents=24,
        d_model=48,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
    )
    return transformers.PerceiverForMaskedLM(config), {"inputs": ids(2, 16)}


def git() -> Built:
    vision = {**SIZES}
    config = transformers.GitConfig(
        vision_config=vision,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=64,
        **CLIP_TEXT,
    )
    return transformers.GitForCausalLM(config), {"input_ids": ids(), "pixel_values": image(2, 3, 32)}


def blip_2() -> Built:
    text = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
    )
    config = transformers.Blip2Config(
        vision_config=dict(SIZES),
        qformer_config={**without(ENCODER, "max_position_embeddings"), "encoder_hidden_size": 48},
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=VOCABULARY - 1,
    )
    tokens = torch.cat([torch.full((2, 4), VOCABULARY - 1), ids()], 1)
    return transformers.Blip2ForConditionalGeneration(config), {"input_ids": tokens, "pixel_values": image(2, 3, 32)}


def patchtst() -> Built:
    config = transformers.PatchTSTConfig(
        num_input_channels=2,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        d_model=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=80,
        prediction_length=4,
    )
    return transformers.PatchTSTForPrediction(config), {"past_values": torch.randn(2, 32, 2)}


def moonshine() -> Built:
    config = transformers.MoonshineConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.MoonshineForConditionalGeneration(config), {
        "input_values": torch.randn(2, 2000),
        "decoder_input_ids": ids(2, 6),
    }


def rt_detr() -> Built:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 24],
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        d_model=32,
        num_queries=5,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=48,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_denoising=0,
        eval_size=None,
    )
    return transformers.RTDetrForObjectDetection(config), {"pixel_values": image(2, 3, 64)}


for each in (perceiver, git, blip_2, patchtst, moonshine, rt_detr):
    NAMED[each.__name__] = each

# timm

pytorch_image_model("cait", "cait_xxs24_224", into=NAMED, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4)
pytorch_image_model(
    "xcit", "xcit_nano_12_p16_224", into=NAMED, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4
)
pytorch_image_model("volo", "volo_d1_224", 64, into=NAMED, img_size=64)
pytorch_image_model("mvitv2", "mvitv2_tiny", 64, into=NAMED, img_size=64)
pytorch_image_model(
    "twins", "twins_svt_small", 64, into=NAMED, img_size=64, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1)
)
pytorch_image_model("crossvit", "crossvit_tiny_240", 240, into=NAMED)
pytorch_image_model("edgenext", "edgenext_xx_small", 64, into=NAMED)
pytorch_image_model(
    "davit", "davit_tiny", 64, into=NAMED, depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 4, 4)
)
pytorch_image_model("coatnet", "coatnet_nano_rw_224", 64, into=NAMED, img_size=64)
pytorch_image_model("inception_v3", "inception_v3", 96, into=NAMED)
pytorch_image_model("nfnet", "nfnet_l0", 64, into=NAMED)
pytorch_image_model("hiera", "hiera_tiny_224", 224, into=NAMED)

for name, size in {
    "vgg11": 32,
    "densenet121": 64,
    "resnext26ts": 64,
    "res2net50_14w_8s": 64,
    "mobilenetv2_050": 64,
    "ghostnet_050": 64,
    "hrnet_w18_small": 64,
    "convnextv2_atto": 64,
    "poolformer_s12": 64,
    "gmixer_12_224": 224,
    "gmlp_s16_224": 224,
    "resmlp_12_224": 224,
    "fastvit_t8": 64,
    "repvit_m0_9": 64,
    "mobileone_s0": 64,
    "efficientformer_l1": 224,
    "inception_next_atto": 64,
    "dla34": 64,
    "sequencer2d_s": 224,
    "starnet_s1": 64,
    "pit_ti_224": 224,
}.items():
    pytorch_image_model(name, name, size, into=OTHERS)

# diffusers


def flux2() -> Built:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=40,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "timestep": torch.tensor([0.3, 0.5]),
        "img_ids": torch.zeros(16, 4),
        "txt_ids": torch.zeros(7, 4),
        "guidance": torch.ones(2),
    }
    return model, inputs


def chroma() -> Built:
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=40,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "timestep": torch.tensor([0.3, 0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
    }
    return model, inputs


def auraflow() -> Built:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=40,
        caption_projection_dim=48,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return model, {
        "hidden_states": image(2, 4, 16),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "timestep": torch.tensor([0.3, 0.5]),
    }


def cogvideox() -> Built:
    model = diffusers.CogVideoXTransformer3DModel(
        **DIT,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=40,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7,
    )
    return model, {
        "hidden_states": torch.randn(2, 2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "timestep": steps(),
    }


def cogview4() -> Built:
    model = diffusers.CogView4Transformer2DModel(
        **DIT, out_channels=4, patch_size=2, text_embed_dim=40, time_embed_dim=16, condition_dim=8, sample_size=8
    )
    inputs = {"hidden_states": image(2, 4, 16), "encoder_hidden_states": torch.randn(2, 7, 40), "timestep": steps()}
    return model, {
        **inputs,
        **{name: torch.tensor([[16, 16]] * 2) for name in ("original_size", "target_size")},
        "crop_coords": torch.zeros(2, 2),
    }


def mochi() -> Built:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=40,
        time_embed_dim=16,
        max_sequence_length=7,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "timestep": steps(),
    }
    return model, {**inputs, "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool)}


def latte() -> Built:
    model = diffusers.LatteTransformer3DModel(
        **DIT,
        out_channels=8,
        cross_attention_dim=48,
        sample_size=8,
        patch_size=2,
        caption_channels=40,
        norm_type="ada_norm_single",
        video_length=2,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "timestep": steps(),
    }


def sana() -> Built:
    model = diffusers.SanaTransformer2DModel(
        **DIT,
        out_channels=4,
        num_cross_attention_heads=3,
        cross_attention_head_dim=16,
        cross_attention_dim=48,
        caption_channels=40,
        sample_size=8,
        patch_size=1,
    )
    return model, {"hidden_states": image(2, 4, 8), "encoder_hidden_states": torch.randn(2, 7, 40), "timestep": steps()}


def ltx() -> Built:
    model = diffusers.LTXVideoTransformer3DModel(**DIT, out_channels=4, cross_attention_dim=48, caption_channels=40)
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "timestep": steps(),
        "encoder_attention_mask": torch.ones(2, 7),
    }
    return model, {**inputs, "num_frames": 1, "height": 4, "width": 4}


def qwen_image() -> Built:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=40,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "timestep": torch.tensor([0.3, 0.5]),
    }
    return model, {
        **inputs,
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.long),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def hunyuan_dit() -> Built:
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        hidden_size=48,
        cross_attention_dim=40,
        cross_attention_dim_t5=24,
        pooled_projection_dim=16,
        text_len=7,
        text_len_t5=5,
        activation_fn="gelu-approximate",
    )
    inputs = {
        "hidden_states": image(2, 4, 16),
        "timestep": steps().float(),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "text_embedding_mask": torch.ones(2, 7),
        "encoder_hidden_states_t5": torch.randn(2, 5, 24),
        "text_embedding_mask_t5": torch.ones(2, 5),
    }
    angles = torch.randn(64, 16)
    return model, {
        **inputs,
        "image_meta_size": torch.ones(2, 6),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def stable_audio() -> Built:
    model = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        num_key_value_attention_heads=3,
        cross_attention_dim=24,
        cross_attention_input_dim=40,
        global_states_input_dim=16,
        time_proj_dim=16,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 16),
        "encoder_hidden_states": torch.randn(2, 7, 40),
        "global_hidden_states": torch.randn(2, 1, 16),
        "timestep": steps().float(),
    }


def unet3d() -> Built:
    model = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=4,
        cross_attention_dim=40,
        attention_head_dim=4,
    )
    return model, {
        "sample": torch.randn(2, 4, 2, 8, 8),
        "timestep": steps(),
        "encoder_hidden_states": torch.randn(2, 7, 40),
    }


def autoencoder_dc() -> Built:
    model = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return model, {"sample": image(2, 3, 16)}


for each in (
    flux2,
    chroma,
    auraflow,
    cogvideox,
    cogview4,
    mochi,
    latte,
    sana,
    ltx,
    qwen_image,
    hunyuan_dit,
    stable_audio,
    unet3d,
    autoencoder_dc,
):
    NAMED[each.__name__] = each


def prior() -> Built:
    model = diffusers.PriorTransformer(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        embedding_dim=24,
        num_embeddings=7,
        additional_embeddings=4,
    )
    return model, {
        "hidden_states": torch.randn(2, 24),
        "timestep": steps(),
        "proj_embedding": torch.randn(2, 24),
        "encoder_hidden_states": torch.randn(2, 7, 24),
    }


def autoencoder_tiny() -> Built:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ), {"sample": image(2, 3, 16)}


for each in (prior, autoencoder_tiny):
    OTHERS[each.__name__] = each


def build(name: str, seed: int = 0) -> Built:
    """Builds any host, those of `host_zoo` too."""
    further = NAMED | OTHERS
    if name not in further:
        return host_zoo.build(name, seed)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model, inputs = further[name]()
    return model.eval(), inputs
