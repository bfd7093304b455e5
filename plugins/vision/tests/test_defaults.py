"""Defaults of vision methods, and what fixes them."""

from typing import Any

import pytest
from named_defaults import Free, Held, assert_as_said, rows

ADAPTFORMER = "ShoufaChen/AdaptFormer@6967d67"
COCOOP = "KaiyangZhou/CoOp@ff61507"
AIM = "taoyang1122/adapt-image-models@b3580d2, mmaction/models/backbones/vit_clip.py"
AIM_K400 = "taoyang1122/adapt-image-models@b3580d2, configs/recognition/vit/vitclip_base_k400.py"
ARC = "DavidYanAnDe/ARC@8227d57"
CONSOLIDATOR = "THU-MIG/Consolidator@545d006"
LORAND = "DongshuoYin/CoLin@332da5c, MMDetection/mmdet/models/backbones/swin_lorand.py"
MONA = "Leiyi-Hu/mona@5deeac9, Swin-Transformer-Object-Detection/mmdet/models/backbones/swin_transformer_mona.py"
PEVIT = "eric-ai-lab/PEViT@be6fb43, vision_benchmark/evaluation/model.py"
CONVPASS = "JieShibo/PETL-ViT@026e4f1, convpass/vtab/convpass.py"
DTL = "heekhero/DTL@bf6c51e"
DYT = "NUS-HPC-AI-Lab/Dynamic-Tuning@d1744f0"
E2VPT = "ChengHan111/E2VPT@7a66e75, src/configs/config.py: _C.MODEL.P_VK"
EVP = "NiFangBaAGe/Explicit-Visual-Prompt@601ae99, configs/train/segformer/train_segformer_evp_cod.yaml"
FACT = "JieShibo/PETL-ViT@026e4f1, FacT"
MAPLE = "muzairkhattak/multimodal-prompt-learning@69bce21, configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml"
PROMPTERS = "hjbahng/visual_prompting@679e71f"
REPADAPTER = "luogen1996/RepAdapter@360992f, repadapter.py"
ST_ADAPTER = "linziyi96/st-adapter@b914b38"
SPT = "ziplab/SPT@e385f67, train_spt.py"
TIP = "gaopengcuhk/Tip-Adapter@d0e2d6f"
VQT = "andytu28/VQT@9bca87e"
VPT = "KMnP/vpt@4410440, src/configs/config.py"
VPT_HEAD = (
    "KMnP/vpt@4410440, src/models/vit_models.py: only parameters of self.enc are frozen, setup_head makes the head"
)

HELD: Held = {
    ("adaptformer", "bottleneck"): (64, f"{ADAPTFORMER}, main_image.py: --ffn_num default=64"),
    ("adaptformer", "scale"): (0.1, f'{ADAPTFORMER}, main_image.py: ffn_adapter_scalar="0.1"'),
    ("adaptformer", "layer_norm"): ("none", f'{ADAPTFORMER}, main_image.py: ffn_adapter_layernorm_option="none"'),
    ("adaptformer", "dropout"): (0.1, f"{ADAPTFORMER}, models/custom_modules.py: Adapter(self.config, dropout=0.1)"),
    ("aim", "frames"): (8, f"{AIM}: ResidualAttentionBlock(..., num_frames=8); the configurations have 8 and 32"),
    ("aim", "ratio"): (0.25, f"{AIM}: Adapter(D_features, mlp_ratio=0.25)"),
    ("aim", "scale"): (0.5, f"{AIM_K400}: adapter_scale=0.5"),
    ("aim", "temporal_adapters"): (1, f"{AIM}: ViT_CLIP(..., num_tadapter=1)"),
    ("aim", "drop_path"): (0.2, f"{AIM_K400}: drop_path_rate=0.2"),
    ("aim", "train_norm"): (
        True,
        "taoyang1122/adapt-image-models@b3580d2, tools/train.py: all but temporal_embedding, ln_post, cls_head and "
        "Adapter is frozen",
    ),
    ("arc", "bottleneck"): (50, f"{ARC}, Model/Model_Config.py: config.adapter_dim = 50"),
    ("arc", "feed_forward_start"): ("xavier", f"{ARC}, Model/ARC_ViT.py: xavier_uniform_(self.adapter_rescale)"),
    ("clip_adapter", "reduction"): (4, "gaopengcuhk/CLIP-Adapter@08d07f8, clip_adapter.py: Adapter(1024, 4)"),
    ("clip_adapter", "ratio"): (0.2, "gaopengcuhk/CLIP-Adapter@08d07f8, clip_adapter.py: ratio = 0.2"),
    ("cocoop", "length"): (4, f"{COCOOP}, configs/trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1.yaml: N_CTX: 4"),
    ("cocoop", "reduction"): (16, f"{COCOOP}, trainers/cocoop.py: nn.Linear(vis_dim, vis_dim // 16)"),
    ("cocoop", "init_ids"): (
        [],
        f'{COCOOP}, trainers/cocoop.py: nn.init.normal_(ctx_vectors, std=0.02) where CTX_INIT is ""; the configuration '
        'has "a photo of a", whose ids only a tokenizer knows',
    ),
    ("cocoop", "placeholder"): (None, f"{COCOOP}, trainers/cocoop.py: prefix, ctx, suffix: behind the first token"),
    ("consolidator", "groups"): (
        None,
        f'{CONSOLIDATOR}, train_consolidator_vtab.sh: GROUP="384" in a ViT-B; ours is half of the common divisor there',
    ),
    ("consolidator", "reorder"): (
        False,
        f"{CONSOLIDATOR}, model/vision_transformer_timm.py: with_channel_shuffle=False, which train.py does not set",
    ),
    ("consolidator", "init_range"): (1e-3, f"{CONSOLIDATOR}, model/vision_transformer_timm.py: REP_BRANCH_INIT_STD"),
    ("consolidator", "stochastic_depth"): (
        0.0,
        f"{CONSOLIDATOR}, train.py: --consolidator_drop_ratio default=0.0; the scripts of tasks have 0 to 0.8",
    ),
    ("consolidator", "train_norms"): (
        True,
        f"{CONSOLIDATOR}, model/vision_transformer_timm.py: if 'norm' in name: param.requires_grad = True",
    ),
    ("convpass", "bottleneck"): (8, f"{CONVPASS}: set_Convpass(model, method, dim=8)"),
    ("convpass", "scale"): (1.0, f"{CONVPASS}: set_Convpass(..., s=1); the configurations of tasks have 0.01 to 100"),
    ("convpass", "conv_init"): (
        "identity",
        f"{CONVPASS}: set_Convpass(..., xavier_init=False); the configurations of 9 tasks have False, of 10 True",
    ),
    ("dtl", "rank"): (2, f"{DTL}, train_vit_vtab.py: --r default=2"),
    ("dtl", "start"): (0.5, f"{DTL}, train_vit_vtab.py: --add_after_blocks default='6-11', of 12 blocks"),
    ("dtl", "beta"): (100.0, f"{DTL}, train_vit_vtab.py: --beta default=100.0"),
    ("dtl", "kernel"): (None, f"{DTL}, train_scripts/vit/vtab/cifar_100/train_dtl.sh: --fusion_size 0"),
    ("dyt", "bottleneck"): (64, f"{DYT}, main_image.py: --ffn_num default=64"),
    ("dyt", "scale"): (0.1, f'{DYT}, main_image.py: ffn_adapter_scalar="0.1"'),
    ("dyt", "dropout"): (0.1, f"{DYT}, models/vision_transformer_IN21K.py: Adapter(self.tuning_config, dropout=0.1)"),
    ("dyt", "rate"): (0.5, f"{DYT}, train_IN21K.sh: --token_target_ratio 0.5"),
    ("dyt", "rate_weight"): (2.0, f"{DYT}, main_image.py: token_ratio=2."),
    ("dyt", "complete"): (1.0, f"{DYT}, engine_finetune.py: loss = loss + teacher_loss + cls_kl_loss"),
    ("dyt", "temperature"): (5.0, f"{DYT}, models/dynamic_adapter.py: TokenSelect(tau=5)"),
    ("dyt", "threshold"): (0.5, f"{DYT}, models/dynamic_adapter.py: TokenSelect(threshold=0.5)"),
    ("dyt", "skip"): (False, f"{DYT}, models/vision_transformer_IN21K.py: mlp_x = sub_token_select * mlp_x"),
    ("dyt", "prefix_tokens"): (None, f"{DYT}, models/dynamic_adapter.py: self.mlp_head(x[:, 1:, :]), the class token"),
    ("dyt", "init_std"): (0.02, f"{DYT}, models/vision_transformer_IN21K.py: trunc_normal_(m.weight, std=.02)"),
    ("dyt", "init_bias"): (0.0, f"{DYT}, models/vision_transformer_IN21K.py: nn.init.zeros_(m.bias)"),
    ("e2vpt", "length"): (5, f"{E2VPT}.NUM_TOKENS_P = 5"),
    ("e2vpt", "dropout"): (0.0, f"{E2VPT}.DROPOUT_P = 0.0; the commands of tasks have 0.1"),
    ("e2vpt", "projection"): (None, f"{E2VPT}.PROJECT = -1"),
    ("e2vpt", "train_head"): (True, "ChengHan111/E2VPT@7a66e75, src/models/vit_models.py: setup_head, as in VPT"),
    ("e2vpt", "kv_length"): (5, f"{E2VPT}.NUM_TOKENS = 5"),
    ("e2vpt", "share_kv"): (True, f"{E2VPT}.SHARE_PARAM_KV = True"),
    ("e2vpt", "kv_dropout"): (0.0, f"{E2VPT}.DROPOUT = 0.0"),
    ("e2vpt", "segments"): (16, f"{E2VPT}.CLS_TOKEN_P_PIECES_NUM = 16"),
    ("evp", "reduction"): (4, f"{EVP}: scale_factor: 4; SETR's configurations have 32"),
    ("evp", "share"): (0.25, f"{EVP}: freq_nums: 0.25"),
    ("evp", "frequencies"): ("high", f"{EVP}: input_type: fft, prompt_type: highpass, handcrafted_tune: true"),
    ("evp", "patches"): (True, f"{EVP}: embedding_tune: true"),
    ("evp", "zero_up"): (
        False,
        "NiFangBaAGe/Explicit-Visual-Prompt@601ae99, models/mmseg/models/backbones/mix_transformer_evp.py: "
        "trunc_normal_(m.weight, std=.02) of all linear maps",
    ),
    ("fact_tk", "rank"): (
        16,
        f"{FACT}/configs/tk: rank: 16 in 6 tasks, 32 in 13; ours is 16, as in fact_tt, whose options it shares",
    ),
    ("fact_tk", "scale"): (1.0, f"{FACT}/fact_tk.py: set_FacT(..., s=1); the configurations of tasks have 0.01 to 100"),
    ("fact_tt", "rank"): (16, f"{FACT}/configs/tt: rank: 16 in 9 tasks, 8 in 9, 4 in one"),
    ("fact_tt", "scale"): (1.0, f"{FACT}/fact_tt.py: set_FacT(..., s=1); the configurations of tasks have 0.01 to 100"),
    ("maple", "length"): (2, f"{MAPLE}: N_CTX: 2"),
    ("maple", "depth"): (9, f"{MAPLE}: PROMPT_DEPTH: 9"),
    ("maple", "init_ids"): (
        [],
        "muzairkhattak/multimodal-prompt-learning@69bce21, trainers/maple.py: nn.init.normal_(ctx_vectors, std=0.02) "
        'without CTX_INIT; the configuration has "a photo of a", whose ids only a tokenizer knows',
    ),
    ("maple", "placeholder"): (
        None,
        "muzairkhattak/multimodal-prompt-learning@69bce21, trainers/maple.py: prefix, ctx, suffix: behind the first",
    ),
    ("kadaptation", "products"): (32, f"{PEVIT}: phm_dim = 32"),
    ("kadaptation", "rank"): (1, f"{PEVIT}: self.phm_rank = 1"),
    ("kadaptation", "scale"): (160.0, f"{PEVIT}: self.lora_attn_alpha / self.lora_attn_dim * 5, 128 and 4"),
    ("kadaptation", "rule_range"): (0.01, f"{PEVIT}: self.phm_rule1_left.data.uniform_(-0.01, 0.01)"),
    ("lorand", "rank"): (8, f"{LORAND}: kernel_dim=8"),
    ("lorand", "branches"): (4, f"{LORAND}: num_branch=4"),
    ("lorand", "reduction"): (2, f"{LORAND}: FACTOR = 2"),
    ("lorand", "zero_up"): (False, f"{LORAND}: kaiming_uniform_ of all factors"),
    ("mona", "bottleneck"): (64, f"{MONA}: nn.Linear(in_dim, 64)"),
    ("mona", "dropout"): (0.1, f"{MONA}: nn.Dropout(p=0.1)"),
    ("mona", "behind"): ("both", f"{MONA}: my_module_1 and my_module_2"),
    ("mona", "zero_up"): (False, f"{MONA}: trunc_normal_(m.weight, std=.02) in init_weights, for all linear layers"),
    ("spt_lora", "share"): (
        0.005,
        "ziplab/SPT@e385f67, engine.py: budgets of 0.05 to 1.0 million; of the 85.1 of all sites it is 0.43",
    ),
    ("spt_lora", "rank"): (8, f"{SPT}: --low_rank_dim default=8"),
    ("spt_lora", "ease"): (10.0, f"{SPT}: --alpha default=10."),
    ("spt_lora", "vector_ease"): (5.0, f"{SPT}: --beta default=5."),
    ("spt_lora", "batches"): (16, f"{SPT}: --sensitivity_batch_num default=16"),
    ("spt_lora", "dropout"): (
        0.0,
        "ziplab/SPT@e385f67, model/vision_transformer_timm.py: nn.Dropout(p=0.1) and DropPath(0.1); ours has none",
    ),
    ("spt_lora", "init_std"): (
        None,
        "ziplab/SPT@e385f67, model/vision_transformer_timm.py: nn.init.zeros_(self.learnable[1].weight), which "
        "trunc_normal_(module.weight, std=.02) of the whole model then overwrites; ours stays an identity",
    ),
    ("spt_lora", "entries"): (None, "ziplab/SPT@e385f67, engine.py: grad_sum, which gradients decide"),
    ("pixel_vp", "shape"): ("frame", f"{PROMPTERS}, main_clip.py: --method default='padding'"),
    ("pixel_vp", "size"): (None, f"{PROMPTERS}, main_clip.py: --prompt_size default=30, of 224; ours is that share"),
    ("pixel_vp", "picture"): (
        None,
        f"{PROMPTERS}, main_clip.py: --image_size default=224; ours without positions",
    ),
    ("pixel_vp", "std"): (1.0, f"{PROMPTERS}, models/prompters.py: torch.randn"),
    ("repadapter", "bottleneck"): (8, f"{REPADAPTER}: hidden_dim=8"),
    ("repadapter", "groups"): (2, f"{REPADAPTER}: groups=2"),
    ("repadapter", "scale"): (1.0, f"{REPADAPTER}: set_RepAdapter(..., dim=8, s=1)"),
    ("st_adapter", "frames"): (8, f"{ST_ADAPTER}, main.py: --num_frames default=8"),
    ("st_adapter", "bottleneck"): (384, f"{ST_ADAPTER}, models_adapter.py: adapter_width=384"),
    ("st_adapter", "kernel"): ((3, 1, 1), f"{ST_ADAPTER}, models_adapter.py: adapter_kernel_size=(3, 1, 1)"),
    ("st_adapter", "before"): (
        "both",
        f"{ST_ADAPTER}, models_adapter.py: clip_vit_base_patch16_adapter24x384 has adapter_pre_attn=True, "
        "adapter_pre_mlp=True; for Kinetics-400 the scripts take adapter12x384, which has the feed-forward's alone",
    ),
    ("tip_adapter", "alpha"): (
        1.17,
        f"{TIP}, configs/imagenet.yaml: init_alpha: 1.17; those of other data have 1.17 to 10",
    ),
    ("tip_adapter", "beta"): (1.0, f"{TIP}, configs/imagenet.yaml: init_beta: 1"),
    ("tip_adapter", "train_keys"): (
        True,
        f"{TIP}, main.py: adapter.weight = nn.Parameter(cache_keys.t()), which is Tip-Adapter until it is trained",
    ),
    ("tip_adapter", "passes"): (10, f"{TIP}, configs/imagenet.yaml: augment_epoch: 10"),
    ("tip_adapter", "images"): (None, f"{TIP}, utils.py: cache_keys of all images of train_loader_cache"),
    ("tip_adapter", "classes"): (None, f"{TIP}, utils.py: F.one_hot(torch.cat(cache_values, dim=0))"),
    ("vpt_deep", "length"): (5, f"{VPT}: _C.MODEL.PROMPT.NUM_TOKENS = 5"),
    ("vpt_deep", "dropout"): (0.0, f"{VPT}: _C.MODEL.PROMPT.DROPOUT = 0.0"),
    ("vpt_deep", "projection"): (None, f"{VPT}: _C.MODEL.PROMPT.PROJECT = -1"),
    ("vpt_deep", "train_head"): (True, VPT_HEAD),
    ("vpt_shallow", "length"): (5, f"{VPT}: _C.MODEL.PROMPT.NUM_TOKENS = 5"),
    ("vpt_shallow", "dropout"): (0.0, f"{VPT}: _C.MODEL.PROMPT.DROPOUT = 0.0"),
    ("vpt_shallow", "projection"): (None, f"{VPT}: _C.MODEL.PROMPT.PROJECT = -1"),
    ("vpt_shallow", "train_head"): (True, VPT_HEAD),
    ("vqt", "length"): (1, f"{VQT}, run_demo_exp.sh: Q_PROMPT_LEN 1"),
    ("vqt", "dropout"): (0.1, f'{VQT}, scripts/VQT/run_vqt_vtab.sh: MODEL.H2T.DROPOUT "0.1"'),
    ("vqt", "summary"): ("concat", f"{VQT}, src/configs/config.py: POOLING_FEATS = WEIGHTED_SUM_FEATS = False"),
    ("vqt", "normalize"): (True, f"{VQT}, src/configs/config.py: _C.MODEL.H2T.NORMALIZE_FEATS = True"),
    ("vqt", "train_head"): (True, f"{VQT}, src/models/build_h2t_model.py: setup_head makes the head"),
}

FREE: Free = {}


@pytest.mark.parametrize(("method", "option", "row"), rows(HELD, FREE))
def test_default(method: str, option: str, row: Any) -> None:
    assert_as_said(method, option, row)
