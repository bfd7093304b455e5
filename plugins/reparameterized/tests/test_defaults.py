"""Defaults of reparameterized methods, and what fixes them."""

from typing import Any

import pytest
from named_defaults import Free, Held, assert_as_said, rows

ADALORA = "QingruZhang/AdaLoRA@d10f5eb, NLG_QA/scripts/run_bart_xsum.sh"
ALORA = "IBM/activated-lora@736414e"
DELORA = "ExplainableML/DeLoRA@2dd91e1, scripts/glue_eval.sh"
PSOFT = "fei407/PSOFT@783a5e2, 1-NLU/script/deberta_v3_base_psoft-cola.sh"
DEFT = "MAXNORM8650/DEFT@8efdc0a, examples/sks_dog_run_all.sh"
GALORE = "jiaweizzhao/GaLore@2cc66f8"
GRALORA = "SqueezeBits/GraLoRA@7dd2945, scripts/train/llm.llama-3_1-8b+data.code.sh"
HRA = "DaShenZi721/HRA@8e0c637"
LILY = "yibozhong/lily@db6ed3c, commonsense-reasoning/finetune_llama.sh"
LORA_ONE = "YuanheZ/LoRA-One@01bba05"
LONGLORA = "dvlab-research/LongLoRA@d4eb344"
LORA_PLUS = "nikhil-ghosh-berkeley/loraplus@a0c44bf"
LORA_XS = "MohammadrezaBanaei/LoRA-XS@e50b1a8"
DYLORA = "huawei-noah/Efficient-NLP@bb44348, DyLoRA"
RUN_GLUE = f"{DYLORA}/examples/NLU/examples/text-classification/run_glue.py"
LYCORIS = "KohakuBlueleaf/LyCORIS@f49d30d"
LYCORIS_PAPER = "arXiv 2309.14859, paragraph on dimension, alpha and factor"
MONTECLORA = "LCS2-IIITD/MonteCLoRA@0cd4a77, run_ft_mc.sh"
MISS = "JL-er/MiSS@a17e631, finetune.py"
OLORA = "huggingface/peft@5d602fd, examples/olora_finetuning/README.md"
WAVEFT = "Bilican/Sparse_PEFT@a2f5e61, example_outputs/config/dog/final_model/training_config.yaml"
PISSA = "arXiv 2404.02948, appendix with table 10"
UNI_LORA = "KaiyangLi1992/Uni-LoRA@e622e78, NLU/NLU/scripts_unilora_qv/roberta_base_cola.sh"
VB_LORA = "leo-yangli/VB-LoRA@2fa62a7, NLU/NLU/scripts_vblora_qv/roberta_base_mrpc.sh"
EVA = "ml-jku/EVA@a5ac24b"
MICA = "huggingface/peft@5d602fd, examples/mica_finetuning/README.md"
KASA = "juyongjiang/KaSA@f85e88c, README.md"
CORDA = "iboing/CorDA@baffb03"
LORA_GA = "Outsider565/LoRA-GA@89af7de"
VELORA = "roymiles/VeLoRA@a6415bc, scripts/finetune_llama_7b.sh"

HELD: Held = {
    ("adalora", "rank"): (12, f"{ADALORA}: --lora_r 12"),
    ("adalora", "target_rank"): (8, f"{ADALORA}: --target_rank 8"),
    ("adalora", "alpha"): (
        8.0,
        f"{ADALORA}: --lora_alpha 32; ours is 8.0, as peft's LoraConfig.lora_alpha",
    ),
    ("adalora", "warmup"): (
        0,
        f"{ADALORA}: --init_warmup 6000, another for each task; ours is 0, as peft's AdaLoraConfig.tinit",
    ),
    ("adalora", "final"): (
        0,
        f"{ADALORA}: --final_warmup 25000, another for each task; ours is 0, as peft's AdaLoraConfig.tfinal",
    ),
    ("adalora", "interval"): (
        1,
        f"{ADALORA}: --mask_interval 100, another for each task; ours is 1, as peft's AdaLoraConfig.deltaT",
    ),
    ("adamss", "components"): (100, "peft 0.21: AdamssConfig.r; as in its examples"),
    ("adamss", "subspaces"): (5, "peft 0.21: AdamssConfig.num_subspaces; 10 in its examples"),
    ("adamss", "rank"): (1, "peft 0.21: AdamssConfig.subspace_rank; 1 for language, 3 for vision in its examples"),
    ("adamss", "threshold"): (None, "peft 0.21: AdamssConfig.use_dynamic_rank is False"),
    ("adamss", "target_subspaces"): (None, "peft 0.21: AdamssConfig.use_asa is False"),
    ("adamss", "warmup"): (50, "peft 0.21: AdamssConfig.init_warmup"),
    ("adamss", "until"): (1000, "peft 0.21: AdamssConfig.final_warmup"),
    ("adamss", "interval"): (100, "peft 0.21: AdamssConfig.mask_interval"),
    ("adamss", "beta1"): (0.85, "peft 0.21: AdamssConfig.asa_importance_beta"),
    ("adamss", "beta2"): (0.85, "peft 0.21: AdamssConfig.asa_uncertainty_beta"),
    ("adamss", "exponent"): (3.0, "peft 0.21: AdamssConfig.asa_schedule_exponent"),
    ("adamss", "projection_seed"): (0, "peft 0.21: AdamssConfig.random_seed"),
    ("alora", "rank"): (32, f"{ALORA}, README.md: r=32"),
    ("alora", "alpha"): (32.0, f"{ALORA}, README.md: lora_alpha=32"),
    ("alora", "dropout"): (
        0.0,
        f"{ALORA}, README.md: lora_dropout=0.05; ours is 0.0, as peft's LoraConfig.lora_dropout",
    ),
    ("alora", "scaling"): ("rank", "peft 0.21: LoraConfig.use_rslora is False"),
    ("adalora", "beta1"): (0.85, f"{ADALORA}: --beta1 0.85"),
    ("adalora", "beta2"): (0.85, f"{ADALORA}: --beta2 0.85"),
    ("adalora", "orthogonality"): (
        0.5,
        f"{ADALORA}: --reg_orth_coef 0.1; ours is 0.5, as peft's AdaLoraConfig.orth_reg_weight",
    ),
    ("boft", "block_size"): (8, "arXiv 2311.06243, tables 2 and 3: BOFT m=2 b=8 of Llama-2-7B"),
    ("boft", "factors"): (2, "arXiv 2311.06243, tables 2 and 3: BOFT m=2 b=8 of Llama-2-7B"),
    ("boft", "block_dropout"): (0.0, "peft 0.21: BOFTConfig.boft_dropout; the paper tunes it by task"),
    ("boft", "side"): ("inputs", "peft 0.21: boft/layer.py turns inputs; LyCORIS turns outputs"),
    ("c3a", "block_size"): (256, "peft 0.21: C3AConfig.block_size, by the authors"),
    ("c3a", "start"): ("xavier_uniform", "arXiv 2407.19342, table A4: Initialization Xavier Uniform"),
    ("deft", "rank"): (8, f"{DEFT}: --lora_rank 8 (and 16)"),
    ("deft", "alpha"): (None, "peft 0.21: DeftConfig.alpha"),
    ("deft", "projection"): ("relu", "peft 0.21: DeftConfig.decomposition_method"),
    ("deft", "injects"): (True, f"{DEFT}: --use_injection"),
    ("deft", "dropout"): (0.0, "peft 0.21: DeftConfig.deft_dropout"),
    ("delora", "rank"): (8, f"{DELORA}: --r 8"),
    ("delora", "strength"): (
        15.0,
        f"{DELORA}: delora_lambda=12 or 4, by task; ours is 15.0, as peft's DeloraConfig.delora_lambda, by the authors",
    ),
    ("delora", "dropout"): (0.0, f"{DELORA}: dropout=0 on MNLI, 0 to 0.25 elsewhere"),
    ("fourierft", "n_frequency"): (1000, "peft 0.21: FourierFTConfig.n_frequency"),
    ("fourierft", "alpha"): (
        150.0,
        "Chaos96/fourierft@4986a28, experiments/GLUE/sst2-base-best.sh: 140 there, 29 to 300 elsewhere; ours is 150.0"
        ", as peft's FourierFTConfig.scaling",
    ),
    ("fourierft", "entry_seed"): (777, "peft 0.21: FourierFTConfig.random_loc_seed"),
    ("frod", "sparsity"): (0.01, "peft 0.21: FrodConfig.sparse_rate; 0.02 in its examples"),
    ("frod", "ridge"): (1e-3, "peft 0.21: FrodConfig.regularization_alpha"),
    ("frod", "dropout"): (0.0, "peft 0.21: FrodConfig.frod_dropout; 0.0 in its examples, too"),
    ("frod", "projection_seed"): (0, "peft 0.21: FrodConfig.projection_prng_key"),
    ("galore", "rank"): (128, f"{GALORE}, scripts/benchmark_c4/llama_60m.sh: --rank 128"),
    ("galore", "gap"): (200, f"{GALORE}, scripts/benchmark_c4/llama_60m.sh: --update_proj_gap 200"),
    ("galore", "scale"): (0.25, f"{GALORE}, scripts/benchmark_c4/llama_60m.sh: --galore_scale 0.25"),
    ("galore", "side"): ("std", f"{GALORE}, README.md: 'proj_type': 'std'"),
    ("gralora", "rank"): (
        32,
        f"{GRALORA}: for LORA_RANK in 16 32 64 128; ours is peft's GraloraConfig.r, by the authors",
    ),
    ("gralora", "alpha"): (64.0, f"{GRALORA}: LORA_ALPHA=$(($LORA_RANK * 2))"),
    ("gralora", "blocks"): (2, f"{GRALORA}: GRALORA_K=2 at ranks 16 and 32"),
    ("gralora", "hybrid_rank"): (0, f"{GRALORA}: HYBRID_R=0"),
    ("gralora", "dropout"): (0.0, "peft 0.21: GraloraConfig.gralora_dropout, by the authors"),
    ("hira", "rank"): (32, "hqsiswiliam/hira@f75f0cf, README.md: --r_ab=32"),
    ("hra", "rank"): (8, f"{HRA}, README.md: r is usually set to 8"),
    ("hra", "orthogonality"): (
        0.0,
        f"{HRA}, nlu/DeBERTa/training/trainer.py: the lines that add orth_loss are commented out (llama/tune.sh has "
        "--lamda 1e-4)",
    ),
    ("hra", "gram_schmidt"): (False, f"{HRA}, README.md: hra_apply_GS, default is false"),
    ("lily", "rank"): (32, f"{LILY}: --lily_r 16; ours is 32, as peft's LilyConfig.r"),
    ("lily", "stride"): (1, f"{LILY}: --ne_1 4, which counts A; ours is 1, as peft's LilyConfig.stride_A"),
    ("lily", "experts"): (2, f"{LILY}: --ne_2 4; ours is 2, as peft's LilyConfig.num_B"),
    ("lily", "scale"): (1.0, "peft 0.21: LilyConfig.scaling"),
    ("lily", "across"): ("name", "peft 0.21: LilyConfig.target_modules, of which each entry shares by itself"),
    ("loha", "rank"): (8, f"{LYCORIS}, example_configs/training_configs/kohya/loha_config.toml: network_dim = 8"),
    ("loha", "alpha"): (
        8.0,
        f"{LYCORIS}, example_configs/training_configs/kohya/loha_config.toml: network_alpha = 4; ours is 8.0, as "
        "peft's LoHaConfig.alpha",
    ),
    ("loha", "rank_dropout_scale"): (False, f"{LYCORIS}, lycoris/modules/loha.py: rank_dropout_scale=False"),
    ("lokr", "rank"): (
        8,
        f"{LYCORIS_PAPER}: no dimension, w2 is full by default; ours is 8, as peft's LoKrConfig.r",
    ),
    ("lokr", "alpha"): (
        8.0,
        f"{LYCORIS}, example_configs/training_configs/kohya/lokr_config.toml: network_alpha = 1, of no effect with a "
        "full w2; ours is 8.0, as peft's LoKrConfig.alpha",
    ),
    ("lokr", "factor_first"): (
        False,
        f"{LYCORIS}, lycoris/functional/general.py: of a factorization the second value is at least the first",
    ),
    ("lokr", "layout"): (
        "kronecker",
        "KohakuBlueleaf/LyCORIS@06abd4a, lycoris/functional/lokr.py: w1 = w1.unsqueeze(-1)",
    ),
    ("lokr", "rank_dropout_scale"): (False, f"{LYCORIS}, lycoris/modules/lokr.py: rank_dropout_scale=False"),
    ("longlora", "rank"): (8, f"{LONGLORA}, fine-tune.py: r=8"),
    ("longlora", "alpha"): (16.0, f"{LONGLORA}, fine-tune.py: lora_alpha=16"),
    ("longlora", "dropout"): (0.0, f"{LONGLORA}, fine-tune.py: lora_dropout=0"),
    ("longlora", "group_ratio"): (0.25, f"{LONGLORA}, llama_attn_replace.py: group_size_ratio = 1/4"),
    ("longlora", "group_size"): (
        None,
        f"{LONGLORA}, llama_attn_replace.py: group_size = int(q_len * ratio)",
    ),
    ("longlora", "train_norms"): (True, f'{LONGLORA}, fine-tune.py: trainable_params default="embed,norm"'),
    ("longlora", "train_embeddings"): (True, f'{LONGLORA}, fine-tune.py: trainable_params default="embed,norm"'),
    ("lora", "rank"): (8, "arXiv 2106.09685, appendix D.1: RoBERTa base, rq = rv = 8"),
    ("lora", "alpha"): (8.0, "arXiv 2106.09685, appendix D.1: RoBERTa base, alpha 8"),
    ("lora", "across_groups"): (
        False,
        "microsoft/LoRA@0771c1e, loralib/layers.py: self.weight + (self.lora_B @ self.lora_A).view(self.weight.shape)",
    ),
    ("lora", "damping"): (None, "arXiv 2106.09685, section 4.1: its factors are trained by their own gradients"),
    ("lora_plus", "embedding_lr"): (1e-6, f"{LORA_PLUS}, README.md: loraplus_lr_embedding, default value 1e-6"),
    ("lora_xs", "rank"): (
        16,
        f"{LORA_XS}, scripts/run_glue.py: for rank in [4, 8, 12, 16, 20, 25]; ours is the one at which alpha is rank",
    ),
    ("lora_xs", "alpha"): (16.0, f"{LORA_XS}, main_glue.py: lora_alpha default=16"),
    ("lora_xs", "std"): (1e-5, f"{LORA_XS}, utils/initialization_utils.py: init_module_weights(..., sigma=0.00001)"),
    ("lora_xs", "start"): ("weight", f"{LORA_XS}, utils/initialization_utils.py: weight=target.weight.T"),
    ("lora_xs", "step"): (
        3e-7,
        "CERT-Lab/lora-sb@4feb81c, train_arithmetic.py: args.lr/(args.warmup_ratio * total_training_steps), which is "
        "1e-4 / (0.02 * 50000 / 3)",
    ),
    ("lora_xs", "dropout"): (0.0, f"{LORA_XS}, main_glue.py: lora_dropout=0.0"),
    ("miss", "rank"): (64, f"{MISS}: miss_r default=64"),
    ("miss", "dropout"): (0.0, f"{MISS}: miss_dropout default=0."),
    ("oft", "block_size"): (32, "peft 0.21: OFTConfig.oft_block_size; the authors count blocks, 4 a layer"),
    ("oft", "block_share"): (False, "Zeju1997/oft@df2b263, README.md: Block sharing is by default false"),
    ("oft", "eps"): (
        None,
        "Zeju1997/oft@df2b263, oft-db/train_dreambooth_oft.sh: --coft; ours is free, as in peft (OFTConfig."
        "coft) and in the authors' parser, where --coft is to be given",
    ),
    ("oft", "block_dropout"): (0.0, "peft 0.21: OFTConfig.module_dropout"),
    ("oft", "side"): ("inputs", "peft 0.21: oft/layer.py turns inputs; LyCORIS turns outputs"),
    ("oft", "constraint"): (None, f"{LYCORIS}, lycoris/modules/diag_oft.py: constraint=0, which is none"),
    ("oft", "rescaled"): (False, f"{LYCORIS}, lycoris/modules/diag_oft.py: rescaled=False"),
    ("olora", "rank"): (8, f'{OLORA}: LoraConfig(init_lora_weights="olora"), which leaves r=8 (the script has 32)'),
    ("olora", "alpha"): (
        8.0,
        f'{OLORA}: LoraConfig(init_lora_weights="olora"), which leaves lora_alpha=8 (the script has 16, at rank 32)',
    ),
    ("osf", "effective_rank"): (0.5, "peft 0.21: OSFConfig.effective_rank=None, half of the smaller side"),
    ("peanut", "rank"): (32, "yibozhong/peanut@5b2b2d7, commonsense&math/scripts/finetune.sh: --lora_r 32"),
    ("peanut", "depth"): (0, "peft 0.21: PeanutConfig.depth"),
    ("peanut", "activation"): ("relu", "peft 0.21: PeanutConfig.act_fn"),
    ("peanut", "scale"): (1.0, "peft 0.21: PeanutConfig.scaling"),
    ("pissa", "rank"): (8, f"{PISSA}: the rank of PiSSA on GLUE is 8"),
    ("pissa", "alpha"): (8.0, f"{PISSA}: alpha is 8 or 16, 8 on MNLI"),
    ("pissa", "dropout"): (0.0, "GraphPKU/PiSSA@87f4db6, README.md: lora_dropout=0"),
    ("pvera", "rank"): (256, "leofillioux/pvera@25a3baa, config/adapters.yaml: rank: 256"),
    ("pvera", "d_initial"): (0.1, "peft 0.21: PveraConfig.d_initial, by the authors"),
    ("pvera", "dropout"): (0.0, "peft 0.21: PveraConfig.pvera_dropout, by the authors"),
    ("pvera", "sample"): ("training", "peft 0.21: PveraConfig.sample_at_inference=False, by the authors"),
    ("pvera", "kl"): (
        0.0,
        "leofillioux/pvera@25a3baa, config/training.yaml: beta, by which it is divided, 1e6 to 1e16; ours is 0.0, as "
        "peft has none",
    ),
    ("pvera", "projection_seed"): (0, "peft 0.21: PveraConfig.projection_prng_key, by the authors"),
    ("randlora", "rank"): (32, "peft 0.21: RandLoraConfig.r, by the authors (64 in their GLUE/train_all.sh)"),
    ("randlora", "alpha"): (640.0, "peft 0.21: RandLoraConfig.randlora_alpha, by the authors: 20 times the rank"),
    ("randlora", "projection_seed"): (0, "peft 0.21: RandLoraConfig.projection_prng_key"),
    ("tinylora", "rank"): (2, "peft 0.21: TinyLoraConfig.r"),
    ("tinylora", "u"): (64, "peft 0.21: TinyLoraConfig.u"),
    ("tinylora", "tying"): (0.0, "peft 0.21: TinyLoraConfig.weight_tying"),
    ("tinylora", "dropout"): (0.0, "peft 0.21: TinyLoraConfig.tinylora_dropout"),
    ("tinylora", "projection_seed"): (42, "peft 0.21: TinyLoraConfig.projection_seed"),
    ("uni_lora", "rank"): (4, f"{UNI_LORA}: --rank 4"),
    ("uni_lora", "theta_length"): (23040, f"{UNI_LORA}: --num_vectors 1, --vector_length 23040 (peft has 256)"),
    ("uni_lora", "dropout"): (0.0, "peft 0.21: UniLoraConfig.unilora_dropout, by the authors"),
    ("uni_lora", "theta_bound"): (0.02, "peft 0.21: UniLoraConfig.init_theta_d_bound, by the authors"),
    ("uni_lora", "projection_seed"): (42, "peft 0.21: UniLoraConfig.proj_seed, by the authors"),
    ("vb_lora", "rank"): (4, f"{VB_LORA}: --rank 4"),
    ("vb_lora", "num_vectors"): (
        256,
        f"{VB_LORA}: --num_vectors 90, 2048 for Llama 2; ours is 256, as peft's VBLoRAConfig.num_vectors",
    ),
    ("vb_lora", "vector_length"): (256, f"{VB_LORA}: --vector_length 256"),
    ("vb_lora", "topk"): (2, f"{VB_LORA}: --topk 2"),
    ("vb_lora", "dropout"): (0.0, "peft 0.21: VBLoRAConfig.vblora_dropout, by the authors"),
    ("vb_lora", "bank_bound"): (0.02, "peft 0.21: VBLoRAConfig.init_vector_bank_bound, by the authors"),
    ("vb_lora", "logits_std"): (0.1, "peft 0.21: VBLoRAConfig.init_logits_std, by the authors"),
    ("vb_lora", "logits_ratio"): (10.0, f"{VB_LORA}: --learning_rate_logits 1e-2, --learning_rate_vector_bank 1e-3"),
    ("bd_lora", "rank"): (8, "peft 0.21: LoraConfig.r"),
    ("bd_lora", "alpha"): (8.0, "peft 0.21: LoraConfig.lora_alpha"),
    ("bd_lora", "scaling"): ("rank", "peft 0.21: LoraConfig.use_rslora is False"),
    ("bd_lora", "dropout"): (0.0, "peft 0.21: LoraConfig.lora_dropout"),
    ("lora", "trained"): ("both", "arXiv 2106.09685, section 4.1: both A and B train"),
    ("monteclora", "rank"): (8, f"{MONTECLORA}: --lora_r 32; ours is 8, as in run_glue.sh and peft's LoraConfig.r"),
    ("monteclora", "alpha"): (8.0, f"{MONTECLORA}: --lora_alpha 64; ours is 8.0, as peft's LoraConfig.lora_alpha"),
    ("monteclora", "scaling"): ("rank", "peft 0.21: LoraConfig.use_rslora is False"),
    ("monteclora", "dropout"): (0.0, "peft 0.21: LoraConfig.lora_dropout"),
    ("monteclora", "samples"): (
        8,
        f"{MONTECLORA}: --monteclora_n 1; ours is 8, as peft's MontecloraConfig.num_samples",
    ),
    ("monteclora", "sample_scale"): (
        1e-4,
        f"{MONTECLORA}: --sample_scaler 1e-6; ours is 1e-4, as peft's MontecloraConfig.sample_scaler",
    ),
    ("monteclora", "prior"): (0.1, "peft 0.21: MontecloraConfig.dirichlet_prior"),
    ("monteclora", "kl"): (1e-5, f"{MONTECLORA}: --kl_loss_weight 1e-5"),
    ("monteclora", "entropy"): (
        False,
        f"{MONTECLORA}: --use_entropy True; ours is False, as peft's MontecloraConfig.use_entropy",
    ),
    ("psoft", "rank"): (32, f"{PSOFT}: rank=46, another for each task; ours is 32, as peft's PsoftConfig.r"),
    ("psoft", "orthogonal"): (True, f'{PSOFT}: orth="True"'),
    ("psoft", "scale_outputs"): (True, f'{PSOFT}: mag_b="True"'),
    ("psoft", "scale_inputs"): (True, f'{PSOFT}: mag_a="True"'),
    ("psoft", "singular_values"): ("outputs", "peft 0.21: PsoftConfig.ab_svd_init"),
    ("psoft", "series"): (
        None,
        f'{PSOFT}: use_neumann="True", 5 terms; ours is exact, as peft\'s PsoftConfig.use_cayley_neumann',
    ),
    ("psoft", "eps"): (None, "peft 0.21: PsoftConfig.cayley_neumann_eps"),
    ("psoft", "dropout"): (0.0, "peft 0.21: PsoftConfig.psoft_dropout"),
    ("road", "variant"): (1, "peft 0.21: RoadConfig.variant"),
    ("road", "group_size"): (
        2,
        "arXiv 2409.00119, equation 4: neighbours are a pair (peft's RoadConfig.group_size is 64)",
    ),
    ("vera", "rank"): (256, "peft 0.21: VeraConfig.r, by the authors"),
    ("vera", "d_initial"): (0.1, "peft 0.21: VeraConfig.d_initial, by the authors"),
    ("vera", "dropout"): (0.0, "peft 0.21: VeraConfig.vera_dropout, by the authors"),
    ("vera", "projection_seed"): (0, "peft 0.21: VeraConfig.projection_prng_key, by the authors"),
    ("waveft", "n_frequency"): (2592, f"{WAVEFT}: n_frequency: 2592"),
    ("waveft", "alpha"): (25.0, f"{WAVEFT}: scaling: 25"),
    ("waveft", "wavelet"): ("db1", f"{WAVEFT}: wavelet_family: db1"),
    ("waveft", "entry_seed"): (777, "peft 0.21: WaveFTConfig.random_loc_seed, by the authors"),
    ("dylora", "rank"): (8, f"{DYLORA}/examples/NLU/roberta_base_mnli.sh: --lora_r 8"),
    ("dylora", "alpha"): (16.0, f"{DYLORA}/examples/NLU/roberta_base_mnli.sh: --lora_alpha 16"),
    ("dylora", "block_size"): (1, f"{RUN_GLUE}: torch.randint(0,maximum_rank,(1,))"),
    ("dylora", "frozen"): (True, f"{RUN_GLUE}: model.set_rank(new_rank, frozen=True)"),
    ("dylora", "dropout"): (0.0, f"{DYLORA}/loralib/layers.py: lora_dropout: float = 0."),
    ("eva", "rank"): (16, f"{EVA}, bash/run_train.sh: adapter_dims=(16)"),
    ("eva", "alpha"): (1.0, f"{EVA}, train.py: lora_alpha: default=1"),
    ("eva", "scaling"): ("rank", "peft 0.21: LoraConfig.use_rslora is False"),
    ("eva", "dropout"): (0.0, f"{EVA}, train.py: lora_dropout: default=0.0"),
    ("eva", "rho"): (2.0, f"{EVA}, svd_precompute.py: rho: default=2"),
    ("eva", "tau"): (0.99, f"{EVA}, svd_precompute.py: early_stop_sim_thresh: default=0.99"),
    ("eva", "whiten"): (False, f"{EVA}, svd_precompute.py: whiten: default=False"),
    ("eva", "keep_scale"): (True, "peft 0.21: EvaConfig.adjust_scaling_factors"),
    ("eva", "use_label_mask"): (
        True,
        f"{EVA}, svd_precompute.py: use_label_mask: default=False; ours is True, as peft's EvaConfig.use_label_mask",
    ),
    ("eva", "iterations"): (4, "peft 0.21: IncrementalPCA.lowrank_niter"),
    ("lora", "start"): ("zero", "peft 0.21: LoraConfig.init_lora_weights is True"),
    ("mica", "rank"): (16, f"{MICA}: r=16"),
    ("mica", "alpha"): (16.0, f"{MICA}: lora_alpha=16"),
    ("mica", "dropout"): (0.0, "peft 0.21: LoraConfig.lora_dropout"),
    ("kasa", "rank"): (8, f"{KASA}: LORA_R=8"),
    ("kasa", "alpha"): (16.0, f"{KASA}: LORA_ALPHA=16"),
    ("kasa", "dropout"): (0.0, f"{KASA}: LORA_DROPOUT=0.0"),
    ("kasa", "beta"): (1e-4, f"{KASA}: BETA=0.0001"),
    ("kasa", "gamma"): (1e-3, f"{KASA}: GEMMA=0.001"),
    ("corda", "rank"): (128, "huggingface/peft@5d602fd, examples/corda_finetuning/README.md: --r 128"),
    ("corda", "alpha"): (None, f"{CORDA}, cordalib/decomposition.py: CorDA_adapter has no scale"),
    ("corda", "dropout"): (0.0, f"{CORDA}, cordalib/decomposition.py: CorDA_adapter drops nothing"),
    ("corda", "mode"): ("ipm", "peft 0.21: CordaConfig.corda_method"),
    ("lora_ga", "rank"): (
        8,
        f"{LORA_GA}, examples/float_llama2-7b_metamath.py: lora_rank=32; ours is 8, as peft's LoraConfig.r",
    ),
    ("lora_ga", "alpha"): (16.0, f"{LORA_GA}, reproduce/conf/peft/all.yaml: lora_alpha: 16"),
    ("lora_ga", "dropout"): (0.0, "peft 0.21: LoraConfig.lora_dropout"),
    ("lora_ga", "direction"): ("ArB2r", f"{LORA_GA}, reproduce/conf/init/gradient.yaml: direction: ArB2r"),
    ("lora_ga", "scale"): ("stable", f"{LORA_GA}, reproduce/conf/init/gradient.yaml: scale: stable"),
    ("lora_ga", "gamma"): (16.0, f"{LORA_GA}, reproduce/conf/init/gradient.yaml: stable_gamma: 16"),
    ("lora_ga", "form"): ("authors", f"{LORA_GA}, reproduce/run_exp.py: B and A are both scaled"),
    ("lora_ga", "iterations"): (4, f"{LORA_GA}, reproduce/run_exp.py: niter=4"),
    ("lora_one", "rank"): (8, f"{LORA_ONE}, README.md: ++peft.lora_r=8"),
    ("lora_one", "alpha"): (16.0, f"{LORA_ONE}, README.md: peft.lora_alpha=16"),
    ("lora_one", "scaling"): ("sqrt_rank", f"{LORA_ONE}, README.md: peft.use_rslora=True"),
    ("lora_one", "dropout"): (0.0, f"{LORA_ONE}, conf/peft/all.yaml: lora_dropout: 0.0"),
    ("lora_one", "gamma"): (128.0, f"{LORA_ONE}, README.md: ++init.stable_gamma=128"),
    ("lora_one", "damping"): (None, f"{LORA_ONE}, README.md: To use LoRA-One without pre-conditioners"),
    ("lora_one", "iterations"): (16, f"{LORA_ONE}, run_exp.py: niter=16"),
    ("velora", "rank"): (32, f"{VELORA}: --lora_r 32"),
    ("velora", "alpha"): (16.0, f"{VELORA}: --lora_alpha 16"),
    ("velora", "dropout"): (
        0.0,
        f"{VELORA}: --lora_dropout 0.1; ours is 0.0, as peft's LoraConfig.lora_dropout",
    ),
    ("velora", "num_groups"): (32, f"{VELORA}: --num_groups 32"),
    ("velora", "projection"): ("first", f"{VELORA}: --init_type 'batch_average_once'"),
    ("velora", "rebuilt_scale"): (0.1, f"{VELORA}: --velora_scale 0.1"),
}

FREE: Free = {
    ("alora", "invocation"): "each adapter has its own; without one it is a LoRA",
    ("eva", "passes"): "a guard, where peft goes on for ever: data on which directions settle ends before",
    ("bd_lora", "blocks"): "the number of devices that will serve it; with peft's 1 it is a LoRA, so ours is the least",
    ("bd_lora", "cut_inputs"): "what is sharded by inputs, by role; peft is told by name",
}


@pytest.mark.parametrize(("method", "option", "row"), rows(HELD, FREE))
def test_default(method: str, option: str, row: Any) -> None:
    assert_as_said(method, option, row)
