"""What peft calls otherwise: its options and variants, for messages to those who come from there."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping

OPTIONS: Mapping[str, tuple[str, str]] = {
    "r": ("use rank=", "rank"),
    "lora_alpha": ("use alpha=", "alpha"),
    "lora_dropout": ("use dropout=", "dropout"),
    "num_virtual_tokens": ("use length=", "length"),
    "use_rslora": ('use scaling="sqrt_rank"', "scaling"),
    "rank_pattern": ('use overrides={"*.q_proj": {"rank": 4}}', "rank"),
    "alpha_pattern": ('use overrides={"*.q_proj": {"alpha": 4.0}}', "alpha"),
    "use_dora": ('use the method "dora"', ""),
    "init_lora_weights": ('use a method of its own, such as "pissa", "olora" or "loftq"', ""),
    "target_modules": ("use target=, with the same names", ""),
    "target_parameters": ("use target=, with the same names", ""),
    "layers_to_transform": ('use a target with layers in it, target=r"re:.*layers\\.[01]\\..*q_proj"', ""),
    "exclude_modules": ("use exclude=", ""),
    "modules_to_save": ("use train=", ""),
    "adapter_name": ("use name=", ""),
    "bias": ('apply ["lora", "bitfit"]: the second one trains biases along', ""),
    "fan_in_fan_out": ("leave it out: how a layer stores its weight is found", ""),
    "layers_pattern": ('use a target with layers in it, target=r"re:.*layers\\.[01]\\..*q_proj"', ""),
    "feedforward_modules": ("use scale_inputs=, with the same names", "scale_inputs"),
    **{f"{each}_dropout": ("use dropout=", "dropout") for each in ("vblora", "unilora", "tinylora", "vera", "pvera")},
    "projection_prng_key": ("use projection_seed=", "projection_seed"),
    "proj_seed": ("use projection_seed=", "projection_seed"),
    "save_projection": ("use store_basis=", "store_basis"),
    "save_indices": ("use store_indices=", "store_indices"),
    "init_vector_bank_bound": ("use bank_bound=", "bank_bound"),
    "init_logits_std": ("use logits_std=", "logits_std"),
    "save_only_topk_weights": ("leave it out: files have all logits", ""),
    "theta_d_length": ("use theta_length=", "theta_length"),
    "init_theta_d_bound": ("use theta_bound=", "theta_bound"),
    "stride_A": ("use stride=", "stride"),
    "num_B": ("use experts=", "experts"),
    "weight_tying": ("use tying=", "tying"),
    "sample_at_inference": ('use sample="always"', "sample"),
    "act_fn": ("use activation=", "activation"),
    "use_bdlora": ('use the method "bd_lora"', ""),
    "nblocks": ("use blocks=", "blocks"),
    "monteclora_config": ('use the method "monteclora"', ""),
    "num_samples": ("use samples=", "samples"),
    "sample_scaler": ("use sample_scale=", "sample_scale"),
    "kl_loss_weight": ("use kl=", "kl"),
    "dirichlet_prior": ("use prior=", "prior"),
    "use_entropy": ("use entropy=", "entropy"),
    "token_dim": ("leave it out: widths are the model's", ""),
    "num_layers": ("leave it out: it acts in all layers of the model", ""),
    "num_attention_heads": ("leave it out: heads are the model's", ""),
    "peft_type": ("leave it out: the method's name says it", ""),
    "base_model_name_or_path": ("leave it out: the model says what it is", ""),
    "task_type": ("leave it out: any model is adapted as it is", ""),
    "inference_mode": ("leave it out: what is loaded is frozen", ""),
}
"""For options of peft's configs: what to write here, and the option that a method needs for that, if it does."""
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
    if option not in OPTIONS:
        return None
    instead, needed = OPTIONS[option]
    return instead if not needed or needed in options else None
