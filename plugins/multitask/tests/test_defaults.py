"""Defaults of multitask methods, and what fixes them."""

from typing import Any

import pytest
from named_defaults import Free, Held, assert_as_said, rows

DARE = "yule-BUAA/MergeLM@0dbd199"
HYDRALORA = "Clin0212/HydraLoRA@afb693b, HydraLoRA/fine-tuning.sh"
LORAMOE = "Ablustrund/LoRAMoE@1177288, run_loramoe.sh"
MIXLORA = "TUDB-Labs/MixLoRA@d59d09b, README.md"
MOELORA = "liuqidong07/MOELoRA-peft@2d9efa4"
MOLA = "GCYZSL/MoLA@01785c8, mola_training.py"
MOLORA = "for-ai/parameter-efficient-moe@e2683fe"
HYPERFORMER = "rabeehk/hyperformer@56b0f99, hyperformer"
HYPERFORMER_PP = f"{HYPERFORMER}/configs/hyperformer++.json"
MTL_LORA = "pUmpKin-Co/MTL-LoRA@7848a70"
MOV = "for-ai/parameter-efficient-moe@e2683fe, configs/mov.gin"
ATTEMPT = "AkariAsai/ATTEMPT@b5121e5, attempt/configs/attempt"
"""MPT has no code of its authors; their paper takes over the tasks of ATTEMPT, and its prompts."""
POLY = "microsoft/mttl@c66b20d, projects/mhr/configs/t0/poly_lora.json"

PALS = "AsaCooperStickland/Bert-n-Pals@9b40f4f"
T2L = "SakanaAI/text-to-lora@8ba7749, src/hyper_llm_modulator"
VL = "ylsung/VL_adapter@545fcbb, VL-T5"
PHA = "Bumble666/PHA@bbb4169, configs/experiments/glue_t5_base.json"
SAPT = "circle-hit/SAPT@52a52b9, gen_script_superni_llama.py"
MOLE = "yushuiwx/Mixture-of-LoRA-Experts@8841fe0"

HELD: Held = {
    ("arrow", "top_k"): (3, "peft 0.21: ArrowConfig.top_k"),
    ("arrow", "temperature"): (1.0, "peft 0.21: ArrowConfig.router_temperature"),
    ("arrow", "general"): (0, "peft 0.21: ArrowConfig.use_gks is False"),
    ("attempt", "tasks"): (1, f'{ATTEMPT}/sinlge_task.json: "task_name": ["mrpc"]'),
    ("attempt", "parts"): (
        [{"method": "prompt_tuning", "length": 100}] * 6,
        f'{ATTEMPT}/sinlge_task.json: "prefix_dim": 100, "prefix_num": 6',
    ),
    ("attempt", "train_parts"): (
        False,
        "AkariAsai/ATTEMPT@b5121e5, attempt/third_party/models/t5/modeling_t5.py: embeddings.clone().detach()",
    ),
    ("attempt", "train_norm"): (
        False,
        "AkariAsai/ATTEMPT@b5121e5, attempt/utils/utils.py: freeze_model_params names attn_W_down, attn_W_up and "
        "prefix_shared; the 232K of the paper's table 1 count the norm",
    ),
    ("attempt", "hidden"): (
        100,
        "AkariAsai/ATTEMPT@b5121e5, attempt/third_party/models/t5/modeling_t5.py: nn.Linear(self.model_dim, 100",
    ),
    ("attempt", "temperature"): (
        None,
        f'{ATTEMPT}/sinlge_task.json: "temperature": 2087, which is e times the width of T5-base',
    ),
    ("dare", "drop_rate"): (0.9, f"{DARE}, README.md: DARE (drop rate 0.9), --weight_mask_rate 0.9"),
    ("dare", "merge"): (
        "linear",
        f"{DARE}, README.md: --mask_apply_method average_merging; ours is the sum, which weights make a mean",
    ),
    ("dare", "scale"): (1.0, f"{DARE}, merge_plms_glue.py: --scaling_coefficient default=1.0"),
    ("hydralora", "rank"): (4, f"{HYDRALORA}: lora_rank=4"),
    ("hydralora", "heads"): (4, f"{HYDRALORA}: lora_b_nums= 4"),
    ("hydralora", "alpha"): (32.0, f"{HYDRALORA}: lora_alpha=32"),
    ("hydralora", "dropout"): (0.05, f"{HYDRALORA}: lora_dropout=0.05"),
    ("loramoe", "experts"): (8, f"{LORAMOE}: lora_nums=8"),
    ("loramoe", "rank"): (4, f"{LORAMOE}: lora_rank=4"),
    ("loramoe", "alpha"): (32.0, f"{LORAMOE}: lora_alpha=32"),
    ("loramoe", "dropout"): (0.05, f"{LORAMOE}: lora_dropout=0.05"),
    ("loramoe", "balance"): (0.0, f"{LORAMOE}: blc_weight=0.0"),
    ("loramoe", "delta"): (0.0, f"{LORAMOE}: blc_alpha=0.0"),
    ("mixlora", "experts"): (8, f'{MIXLORA}: "num_experts": 8'),
    ("mixlora", "top_k"): (2, f'{MIXLORA}: "top_k": 2'),
    ("mixlora", "rank"): (8, f'{MIXLORA}: "r": 8'),
    ("mixlora", "alpha"): (16.0, f'{MIXLORA}: "lora_alpha": 16'),
    ("mixlora", "dropout"): (0.05, f'{MIXLORA}: "lora_dropout": 0.05'),
    ("mixlora", "balance"): (
        0.01,
        f'{MIXLORA}: "router_aux_loss_coef": 0.01; mixlora/config.py has 0.001 where a file says nothing',
    ),
    ("moelora", "tasks"): (1, f"{MOELORA}, src/MLoRA/arguments.py: task_num default=16; ours is 1, as in polytropon"),
    ("moelora", "experts"): (8, f"{MOELORA}, experiments/moelora.bash: --expert_num 8"),
    ("moelora", "rank"): (16, f"{MOELORA}, experiments/moelora.bash: lora_rank=16"),
    ("moelora", "alpha"): (32.0, f"{MOELORA}, src/MLoRA/arguments.py: lora_alpha default=32."),
    ("moelora", "dropout"): (0.1, f"{MOELORA}, experiments/moelora.bash: lora_dropout=0.1"),
    ("moelora", "task_width"): (64, f"{MOELORA}, src/MLoRA/arguments.py: task_embedding_dim default=64"),
    ("moelora", "gate"): (
        "shared",
        f"{MOELORA}, src/MLoRA/peft/peft_model.py: PeftModelForCausalLMShared, whose lora_gate all layers are given",
    ),
    ("mola", "experts"): ([2, 4, 6, 8], f'{MOLA}: number_experts: str = "2,2,2,2,2,2,2,2,4,4,4,4,4,4,4,4,6, ...'),
    ("mola", "top_k"): (2, f'{MOLA}: top_k: str = "2,2,2, ...'),
    ("mola", "rank"): (8, f'{MOLA}: lora_r: str = "8,8,8, ...'),
    ("mola", "alpha"): (16.0, f"{MOLA}: lora_alpha: int = 16"),
    ("mola", "dropout"): (0.05, f"{MOLA}: lora_dropout: float = 0.05"),
    ("mola", "balance"): (0.0, f"{MOLA}: obalance: bool = False"),
    ("mole", "train_parts"): (
        True,
        f"{MOLE}, dreambooth/utils.py: mark_only_gate_as_trainable; parts of one's own start without effect, so here "
        "they train",
    ),
    ("mole", "balance"): (
        0.0,
        f"{MOLE}, dreambooth/train_mixture_of_experts.py: torch.Tensor([unet_entropy]), which has no gradient",
    ),
    ("molora_moe", "experts"): (10, f"{MOLORA}, configs/molora.gin: num_experts = 10"),
    ("molora_moe", "rank"): (4, f"{MOLORA}, configs/molora.gin: rank = 4"),
    ("molora_moe", "alpha"): (16.0, f"{MOLORA}, src/molora.py: alpha = 16"),
    ("hyperformer_pp", "tasks"): (
        1,
        f'{HYPERFORMER_PP}: "tasks": those of GLUE; here none is known',
    ),
    ("hyperformer_pp", "shared"): (
        True,
        f'{HYPERFORMER_PP}: "efficient_unique_hyper_net": true',
    ),
    ("hyperformer_pp", "bottleneck"): (24, f'{HYPERFORMER_PP}: "reduction_factor": 32, of 768'),
    ("hyperformer_pp", "task_width"): (64, f'{HYPERFORMER_PP}: "task_embedding_dim": 64'),
    ("hyperformer_pp", "hidden"): (128, f"{HYPERFORMER}/adapters/adapter_configuration.py: task_hidden_dim = 128"),
    ("hyperformer_pp", "code"): (64, f'{HYPERFORMER_PP}: "projected_task_embedding_dim": 64'),
    ("hyperformer_pp", "activation"): (
        "gelu_tanh",
        f'{HYPERFORMER_PP}: "non_linearity": "gelu_new"',
    ),
    ("hyperformer_pp", "joins"): (
        "matrix",
        f"{HYPERFORMER}/third_party/models/modeling_t5.py: hidden_states + self.dropout(y), y with the adapter",
    ),
    ("hyperformer_pp", "init_std"): (0.01, f"{HYPERFORMER}/adapters/adapter_utils.py: linear_layer(..., std=1e-2)"),
    ("hyperformer_pp", "gain_std"): (0.01, f"{HYPERFORMER}/adapters/adapter_utils.py: LayerNormHyperNet"),
    ("hyperformer_pp", "train_layer_norm"): (
        True,
        f'{HYPERFORMER_PP}: "unfreeze_layer_norms": true',
    ),
    ("mov", "experts"): (30, f"{MOV}: num_experts = 30"),
    ("mtl_lora", "tasks"): (
        1,
        f"{MTL_LORA}, mlora_finetune.py: --lambda_num default=3; here none is known",
    ),
    ("mtl_lora", "rank"): (8, f"{MTL_LORA}, README.md: llama2_7B_mlora_qkvo.sh 8 16"),
    ("mtl_lora", "ups"): (3, f"{MTL_LORA}, script/llama2_7B_mlora_qkvo.sh: --num_B 3"),
    ("mtl_lora", "alpha"): (16.0, f"{MTL_LORA}, README.md: llama2_7B_mlora_qkvo.sh 8 16"),
    ("mtl_lora", "temperature"): (0.1, f"{MTL_LORA}, script/llama2_7B_mlora_qkvo.sh: --temperature 0.1"),
    ("mtl_lora", "task_matrix"): ("full", f'{MTL_LORA}, mlora_finetune.py: "diagonal_format": False'),
    ("mtl_lora", "dropout"): (0.05, f"{MTL_LORA}, mlora_finetune.py: --lora_dropout default=0.05"),
    ("multitask_prompt_tuning", "tasks"): (1, "peft 0.21: MultitaskPromptTuningConfig.num_tasks"),
    ("multitask_prompt_tuning", "length"): (
        20,
        f'{ATTEMPT}/eval_glue.json: "prefix_dim": 100; ours is 20 as in prompt_tuning, and no reason is written',
    ),
    ("multitask_prompt_tuning", "rank"): (1, "peft 0.21: MultitaskPromptTuningConfig.num_ranks"),
    ("multitask_prompt_tuning", "init"): (
        "vocabulary",
        f'{ATTEMPT}/multi_task_others.json: "init_prefix_from_vocab": true',
    ),
    ("pal", "tasks"): (1, f"{PALS}, modeling.py: num_tasks=1"),
    ("pal", "width"): (204, f'{PALS}, configs/pals_config.json: "hidden_size_aug": 204'),
    ("pal", "heads"): (6, f"{PALS}, modeling.py: self.attn = BERTSelfAttention(config, 6); the paper has 12"),
    ("pal", "dropout"): (0.1, f'{PALS}, configs/pals_config.json: "attention_probs_dropout_prob": 0.1'),
    ("pal", "init_std"): (0.02, f'{PALS}, configs/pals_config.json: "initializer_range": 0.02'),
    ("pal", "up_std"): (0.02, f'{PALS}, configs/pals_config.json: "initializer_range": 0.02'),
    ("pha", "tasks"): (1, f'{PHA}: "tasks": those of GLUE; here none is known'),
    ("pha", "bottleneck"): (64, f'{PHA}: "encoder_adapter_dim": 64, "decoder_adapter_dim": 64'),
    ("pha", "task_width"): (
        64,
        "Bumble666/PHA@bbb4169, modeling/adapter_t5.py: nn.Embedding(len(self.config.tasks), 64)",
    ),
    ("pha", "hidden"): (
        128,
        "Bumble666/PHA@bbb4169, modeling/adapter_generators.py: nn.Linear(self.input_dim, 128)",
    ),
    ("pha", "code"): (64, "Bumble666/PHA@bbb4169, modeling/adapter_generators.py: nn.Linear(128, 64)"),
    ("pha", "contrast"): (0.1, "Bumble666/PHA@bbb4169, third_party/trainers/t5_trainer.py: loss *= 0.1"),
    ("pha", "temperature"): (
        0.1,
        "Bumble666/PHA@bbb4169, third_party/trainers/t5_trainer.py: torch.matmul(features, task_embed.T), 0.1)",
    ),
    ("pha", "init_scale"): (
        1e-3,
        "Bumble666/PHA@bbb4169, modeling/adapter_generators.py: bound = 1e-3 * math.sqrt(3 / (hypernet_in * "
        "mainnet_in))",
    ),
    ("polytropon", "tasks"): (1, "peft 0.21: PolyConfig.n_tasks"),
    ("polytropon", "skills"): (
        4,
        f'{POLY}: "n_skills": 8; ours is 4, as peft\'s PolyConfig.n_skills',
    ),
    ("polytropon", "own_skills"): (0, "peft 0.21: PolyConfig has none"),
    ("polytropon", "splits"): (1, f'{POLY}: "n_splits": 1'),
    ("polytropon", "rank"): (8, f'{POLY}: "lora_rank": 1; ours is 8, as peft\'s PolyConfig.r'),
    ("polytropon", "routing_ratio"): (
        100.0,
        f'{POLY}: "module_logits_learning_rate": 0.1 beside "adapters_learning_rate" : 1e-3',
    ),
    ("regmean", "off_diagonal"): (
        0.9,
        "bloomberg/dataless-model-merging@92247ae, regmean_demo.ipynb: reduce_non_diag(param_grams, a=0.9), and "
        "src/configs/exps/deberta/ner/ood/deberta-ner-regmean.yaml: regmean_reduce_nondiag: 0.9; others have 0.1",
    ),
    ("regmean", "unseen"): (
        "mean",
        "bloomberg/dataless-model-merging@92247ae, src/model_merge/avg_merger.py: torch.inverse(sum_gram), which "
        "has to exist; an input that is zero in all tasks is ours",
    ),
    ("sapt", "tasks"): (1, f"{SAPT}: the first task; each next one has one more"),
    ("sapt", "rank"): (4, f"{SAPT}: lora_r = 4"),
    ("sapt", "alpha"): (32.0, f"{SAPT}: lora_alpha = 32"),
    ("sapt", "hidden"): (100, f"{SAPT}: trans_hidden_dim = 100"),
    ("sapt", "replay"): (1.0, f"{SAPT}: kl_ratio = 1; gen_script_superni_t5.py has 0.5"),
    ("task_arithmetic", "scale"): (
        0.4,
        "prateeky2806/ties-merging@44e7891, src/ties_minimal.ipynb: lamda = 0.4 under Task Vector Merging example; the "
        "authors leave it to validation data (mlfoundations/task_vectors@02363be, README.md has 0.8 for two)",
    ),
    ("text_to_lora", "vector_width"): (
        1024,
        "SakanaAI/text-to-lora@8ba7749, scripts/train_t2l_mistral.sh: --emb_model=Alibaba-NLP/gte-large-en-v1.5, which "
        "has vectors of 1024",
    ),
    ("text_to_lora", "rank"): (8, f"{T2L}/utils/model_loading.py: r=8 if peft_type == PeftType.LORA"),
    ("text_to_lora", "alpha"): (16.0, f'{T2L}/utils/model_loading.py: "lora_alpha" is "r" * 2, with "use_rslora"'),
    ("text_to_lora", "dropout"): (0.05, f"{T2L}/utils/model_loading.py: lora_dropout = 0.05"),
    ("text_to_lora", "latent"): (128, f"{T2L}/configs.py: hypernet_latent_size default=128"),
    ("text_to_lora", "head_width"): (512, f"{T2L}/configs.py: head_in_size default=512"),
    ("text_to_lora", "network_dropout"): (0.05, f"{T2L}/hyper_modulator.py: nn.Dropout(0.05)"),
    ("text_to_lora", "decay"): (
        1e-3,
        "SakanaAI/text-to-lora@8ba7749, scripts/train_t2l_mistral.sh: --l2_reg_generated_w=1e-3",
    ),
    ("ties_merging", "density"): (0.2, "prateeky2806/ties-merging@44e7891, README.md: $redundant = topk20"),
    ("ties_merging", "sign"): ("total", "prateeky2806/ties-merging@44e7891, README.md: $elect = mass"),
    ("ties_merging", "scale"): (1.0, "prateeky2806/ties-merging@44e7891, src/ties_minimal.ipynb: lamda = 1"),
    ("vl_adapter", "tasks"): (1, f"{VL}/scripts/image/single_adapter.sh: one adapter for all, so here none is known"),
    ("vl_adapter", "shared"): ("all", f"{VL}/scripts/image/single_adapter.sh: --use_single_adapter"),
    ("vl_adapter", "bottleneck"): (96, f"{VL}/scripts/image/single_adapter.sh: --reduction_factor 8, of 768"),
    ("vl_adapter", "activation"): ("gelu_tanh", f'{VL}/src/adapters/config.py: non_linearity: str = "gelu_new"'),
    ("vl_adapter", "joins"): (
        "matrix",
        f"{VL}/src/my_transformers/modeling_bart.py: F.dropout(hidden_states, ...) behind attn_adapter",
    ),
    ("vl_adapter", "train_layer_norm"): (True, f"{VL}/scripts/image/single_adapter.sh: --unfreeze_layer_norms"),
    ("vl_adapter", "init_std"): (
        0.02,
        f"{VL}/src/my_transformers/modeling_bart.py: _init_weights has std = self.config.init_std, BART's 0.02",
    ),
    ("vl_adapter", "up_init_std"): (0.02, f"{VL}/src/my_transformers/modeling_bart.py: _init_weights, as of init_std"),
    ("xlora", "train_parts"): (
        True,
        "peft 0.21: XLoraConfig.use_trainable_adapters is False; parts of one's own start without effect, so here they "
        "train",
    ),
    ("xlora", "layerwise"): (False, "peft 0.21: XLoraConfig.layerwise_scalings"),
    ("xlora", "softmax"): (True, "peft 0.21: XLoraConfig.enable_softmax"),
    ("xlora", "temperature"): (1.0, "peft 0.21: XLoraConfig.softmax_temperature"),
    ("xlora", "softmax_top_k"): (False, "peft 0.21: XLoraConfig.enable_softmax_topk"),
    ("xlora", "depth"): (1, "peft 0.21: XLoraConfig.xlora_depth"),
    ("xlora", "width"): (2048, "peft 0.21: XLoraConfig.xlora_size"),
    ("xlora", "dropout"): (0.2, "peft 0.21: XLoraConfig.xlora_dropout_p"),
    ("xlora", "scale"): (1.0, "peft 0.21: XLoraConfig.global_scaling_weight"),
}

FREE: Free = {
    ("moa_adapters", "activation"): "no single paper has it; as in houlsby_adapter",
    ("moa_adapters", "balance"): "no single paper has it",
    ("moa_adapters", "bottleneck"): "no single paper has it",
    ("moa_adapters", "experts"): "no single paper has it",
    ("moa_adapters", "joins"): "no single paper has it; as in houlsby_adapter",
    ("moa_adapters", "top_k"): "no single paper has it",
    ("polyhistor", "activation"): "no code, nor the paper's text; as in hyperformer_pp",
    ("polyhistor", "joins"): "no code, nor the paper's text; as in hyperformer_pp",
    ("polyhistor", "rank"): "no code, nor the paper's text; the smallest there is",
    ("polyhistor", "reduction"): "no code, nor the paper's text; as in hyperformer_pp, 24 of 768",
    ("polyhistor", "task_width"): "no code, nor the paper's text; as in hyperformer_pp",
    ("polyhistor", "tasks"): "no code, nor the paper's text; none is known",
    ("polyhistor", "width"): "the narrowest site's, as the templates of the paper are those of the smallest stage",
    ("loramoe", "tasks"): "the authors' two kinds of data are in their code; with one, nobody has to tell them",
}


@pytest.mark.parametrize(("method", "option", "row"), rows(HELD, FREE))
def test_default(method: str, option: str, row: Any) -> None:
    assert_as_said(method, option, row)
