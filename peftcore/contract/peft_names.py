"""What peft calls otherwise: its options and variants, for messages to those who come from there."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping

Answer = tuple[str, str]
"""What to write here, and the option that a method needs for that; "" where it needs none."""

LEFT_OUT = {
    "adapter_name": "use name=",
    "base_model_name_or_path": "leave it out: the model says what it is",
    "bias": 'apply ["lora", "bitfit"]: the second one trains biases along',
    "ensure_weight_tying": "leave it out: tied tables stay tied",
    "fan_in_fan_out": "leave it out: how a layer stores its weight is found",
    "inference_mode": "leave it out: what is loaded is frozen",
    "init_weights": "leave it out: a fresh adapter starts as its paper has it",
    "init_ia3_weights": "leave it out: a fresh adapter starts as its paper has it",
    "lora_bias": 'apply ["lora", "bitfit"]: the second one trains biases along',
    "megatron_config": "leave it out: layers are found by what they are",
    "megatron_core": "leave it out: layers are found by what they are",
    "num_attention_heads": "leave it out: heads are the model's",
    "num_layers": "leave it out: it acts in all layers of the model",
    "num_transformer_submodules": "leave it out: stacks are found; target= says which",
    "peft_type": "leave it out: the method's name says it",
    "runtime_config": "leave it out",
    "runtime_offload_base_weight": "leave it out: weights of the base stay where they are",
    "progressbar": "leave it out",
    "save_only_topk_weights": "leave it out: files have all logits",
    "task_type": "leave it out: any model is adapted as it is",
    "token_dim": "leave it out: widths are the model's",
    "total_step": "leave it out: the optimizer says how many steps there are",
    "use_idwt": "use wavelet=None for false",
    "proportional_parameters": "use overrides= with an n_frequency for each layer",
    "init_v_bound": "leave it out: a fresh adapter starts as its paper has it",
    "init_scale": "leave it out: a fresh adapter starts as its paper has it",
    "target_modules": "use target=, with the same names",
    "target_parameters": "use target=, with the same names",
    "exclude_modules": "use exclude=",
    "modules_to_save": "use train=",
    "layers_to_transform": 'use a target with layers in it, target=r"re:.*layers\\.[01]\\..*q_proj"',
    "layers_pattern": 'use a target with layers in it, target=r"re:.*layers\\.[01]\\..*q_proj"',
    "trainable_token_indices": 'apply ["lora", {"method": "trainable_tokens", "token_indices": [...]}]',
    "tokenizer_name_or_path": "leave it out: init_ids= has the ids",
    "tokenizer_kwargs": "leave it out: init_ids= has the ids",
    "psoft_alpha": "leave it out: it has no effect in peft either",
    "shadow_model": 'use sizes= of that network, and injection.shared["guest"].take(network)',
    "layer_replication": "call peftcore.replicate_layers(model, [...]) before it is adapted",
    "generator_seed": "use torch.manual_seed, or seeds= of a route",
    "poly_type": "leave it out: routing is Polytropon's",
    "prompt_tuning_init_task": "load the adapter that it is to start from, and train on",
    "prompt_tuning_init_state_dict_path": "load the adapter that it is to start from, and train on",
}
"""Options of peft for which no option of a method stands."""
OTHER_METHODS = {
    "use_dora": "dora",
    "loftq_config": "loftq",
    "alora_invocation_tokens": "alora",
    "use_qalora": "qa_lora",
    "qalora_group_size": "qa_lora",
    **{f"{each}_config": each for each in ("eva", "corda", "lora_ga", "kasa", "velora", "monteclora")},
    "use_bdlora": "bd_lora",
}
"""Options of peft that are methods of their own here."""
RENAMED: Mapping[str, str | tuple[str, ...]] = {
    "r": ("components", "rank", "block_size"),
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "num_virtual_tokens": "length",
    "adapter_len": "length",
    "adapter_layers": "layers",
    "feedforward_modules": "scale_inputs",
    **{
        f"{each}_dropout": "dropout"
        for each in (
            "vblora",
            "unilora",
            "tinylora",
            "vera",
            "pvera",
            "deft",
            "gralora",
            "hira",
            "miss",
            "psoft",
            "randlora",
            "frod",
        )
    },
    "projection_prng_key": "projection_seed",
    "proj_seed": "projection_seed",
    "save_indices": "store_indices",
    "init_vector_bank_bound": "bank_bound",
    "init_logits_std": "logits_std",
    "theta_d_length": "theta_length",
    "init_theta_d_bound": "theta_bound",
    "stride_A": "stride",
    "num_B": "experts",
    "weight_tying": "tying",
    "act_fn": "activation",
    "target_r": "target_rank",
    "init_r": "rank",
    "tinit": "warmup",
    "tfinal": "final",
    "deltaT": "interval",
    "orth_reg_weight": "orthogonality",
    "boft_block_size": "block_size",
    "boft_n_butterfly_factor": "factors",
    "boft_dropout": "block_dropout",
    "decomposition_method": "projection",
    "delora_lambda": "strength",
    "module_dropout": ("dropout", "block_dropout"),
    "scaling": ("alpha", "scale"),
    "random_loc_seed": "entry_seed",
    "hybrid_r": "hybrid_rank",
    "gralora_k": "blocks",
    "apply_GS": "gram_schmidt",
    "use_effective_conv2d": "tucker",
    "decompose_factor": "factor",
    "mini_r": "outputs",
    "num_ranks": "rank",
    "num_tasks": "tasks",
    "n_tasks": "tasks",
    "n_skills": "skills",
    "n_splits": "splits",
    "prompt_tuning_init": "init",
    "prompt_tuning_init_text": "init_ids",
    "encoder_hidden_size": ("hidden", "projection"),
    "prefix_projection": "projection",
    "encoder_reparameterization_type": "encoder",
    "encoder_dropout": "lstm_dropout",
    "oft_block_size": "block_size",
    "coft": "eps",
    "use_cayley_neumann": "series",
    "num_cayley_neumann_terms": "series",
    "cayley_neumann_eps": "eps",
    "target_svd_config": "effective_rank",
    "psoft_orth": "orthogonal",
    "psoft_mag_b": "scale_outputs",
    "psoft_mag_a": "scale_inputs",
    "ab_svd_init": "singular_values",
    "psoft_svd": "iterations",
    "psoft_svd_lowrank_niter": "iterations",
    "randlora_alpha": "alpha",
    "sparse_rate": "sparsity",
    "num_subspaces": "subspaces",
    "subspace_rank": "rank",
    "use_dynamic_rank": "threshold",
    "svd_threshold": "threshold",
    "use_asa": "target_subspaces",
    "asa_target_subspaces": "target_subspaces",
    "init_warmup": "warmup",
    "final_warmup": "until",
    "mask_interval": "interval",
    "asa_importance_beta": "beta1",
    "asa_uncertainty_beta": "beta2",
    "asa_schedule_exponent": "exponent",
    "regularization_alpha": "ridge",
    "sparse": "basis",
    "very_sparse": "basis",
    "mask_type": "mask",
    "wavelet_family": "wavelet",
    "nblocks": "blocks",
    "num_samples": "samples",
    "sample_scaler": "sample_scale",
    "kl_loss_weight": "kl",
    "dirichlet_prior": "prior",
    "use_entropy": "entropy",
    "config_C": "C",
    "shadow_alpha": "scale",
    "shadow_dropout": "dropout",
    "shadow_num_hidden_layers": "layers",
    "shadow_hidden_size": "sizes",
    "shadow_num_attention_heads": "sizes",
    "shadow_intermediate_size": "sizes",
    "update_hidden_size": "update_width",
    "auxiliary_loss_weight": "guest_weight",
}
"""Options of peft by another name, and ours; of several that which the method has."""
OPTIONS: Mapping[str, tuple[Answer, ...]] = {
    **{name: ((text, ""),) for name, text in LEFT_OUT.items()},
    **{name: ((f'use the method "{method}"', ""),) for name, method in OTHER_METHODS.items()},
    **{
        name: tuple((f"use {each}=", each) for each in ((ours,) if isinstance(ours, str) else ours))
        for name, ours in RENAMED.items()
    },
    "use_rslora": (('use scaling="sqrt_rank"', "scaling"), ("use alpha=", "alpha")),
    "init_lora_weights": (('use a method of its own, such as "pissa", "olora" or "loftq"', ""),),
    "sample_at_inference": (('use sample="always"', "sample"),),
    "boft_block_num": (("use block_size=, the width by the number of blocks", "block_size"),),
    "config_A_B": (("use A= and B=", "A"),),
    "config_D_E": (("use D= and E=", "D"),),
    "share_embeddings": (("use own_table=, the opposite", "own_table"),),
    "para": (("use injects=, the opposite", "injects"),),
    "encoder_num_layers": (('use encoder="mlp" or "lstm", whose layers are two', "encoder"),),
    "random_seed": (("use projection_seed=", "projection_seed"), ("use seed=", "")),
    "save_projection": (("use store_basis=", "store_basis"), ("leave it out: files have what is frozen", "")),
    "rank_pattern": (
        ('use overrides={"*.q_proj": {"rank": 4}}', "rank"),
        ('use overrides={"*.q_proj": {"effective_rank": 4}}', "effective_rank"),
    ),
    "alpha_pattern": (('use overrides={"*.q_proj": {"alpha": 4.0}}', "alpha"),),
    "lambda_pattern": (('use overrides={"*.q_proj": {"strength": 4.0}}', "strength"),),
    "block_size_pattern": (('use overrides={"*.q_proj": {"block_size": 4}}', "block_size"),),
    "n_frequency_pattern": (('use overrides={"*.q_proj": {"n_frequency": 400}}', "n_frequency"),),
}
"""For options of peft's configs: what to write here; the first answer counts whose option the method has."""
METHODS: Mapping[str, str] = {
    "loraplus": "use lora_plus",
}
"""For variants that peft has as options: the method that they are here."""


def is_peft_config(method: object) -> bool:
    """Whether it is a configuration of peft, which is looked up and not imported: whoever has one has imported it."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(method, peft.PeftConfig)


def instead_of(option: str, options: Collection[str]) -> str | None:
    """Returns what to write for an option of peft's in a method with these options; None for other names."""
    return next((text for text, needed in OPTIONS.get(option, ()) if not needed or needed in options), None)
