"""Defaults of hybrid methods, and what fixes them."""

from typing import Any

import pytest
from named_defaults import Free, Held, assert_as_said, rows

UNIPELT = "morningmoni/UniPELT@53d3c35, run_glue.py"
XSUM = "jxhe/unify-parameter-efficient-tuning@3222ce2, exps/run_xsum.sh"

MNLI = "microsoft/AdaMix@d361e9d, roberta_large_mnli_expert_soup.sh"
AUTHORS = "microsoft/AdaMix@d361e9d, src/transformers/models"
PROPETL = "ChaosCodes/ProPETL@1c08f19, propetl-roberta/"

HELD: Held = {
    ("adamix", "experts"): (4, f"{MNLI}: --num_experts 4"),
    ("adamix", "bottleneck"): (16, f"{MNLI}: --adapter_size 16"),
    ("adamix", "shared"): ("up", f"{MNLI}: --sharing_up 1, --sharing_down 0"),
    ("adamix", "consistency"): (
        1.0,
        f"{AUTHORS}/roberta/modeling_roberta.py: loss += symmetric_KL_loss(logits, logits_additional)",
    ),
    ("adamix", "routing"): (
        "random",
        f"{AUTHORS}/expert_soup.py: torch.randint unless expert_score_weight.requires_grad, which starts False",
    ),
    ("adamix", "joins"): (
        "matrix",
        f"{AUTHORS}/roberta/modeling_roberta.py: RobertaOutput calls ExpertSoup in front of its dropout",
    ),
    ("adamix", "init_std"): (0.02, f"{AUTHORS}/roberta/modeling_roberta.py: _init_weights, of initializer_range"),
    ("adamix", "up_init_std"): (0.02, f"{AUTHORS}/roberta/modeling_roberta.py: _init_weights, of initializer_range"),
    ("glora", "rank"): (
        8,
        "Arnav0400/ViT-Slim@0fed674, GLoRA/supernet.py: --rank default=4; ours is 8, as peft's GloraConfig.r",
    ),
    ("glora", "A"): ("lora", "peft 0.21: GloraConfig.config_A_B; the authors search it"),
    ("glora", "B"): ("lora", "peft 0.21: GloraConfig.config_A_B; the authors search it"),
    ("glora", "C"): ("lora", "peft 0.21: GloraConfig.config_C; the authors search it"),
    ("glora", "D"): ("constant", "peft 0.21: GloraConfig.config_D_E; the authors search it"),
    ("glora", "E"): ("constant", "peft 0.21: GloraConfig.config_D_E; the authors search it"),
    ("mam_adapter", "prefix_length"): (30, f"{XSUM}: attn_bn=30 under MAM adapter"),
    ("mam_adapter", "prefix_mid_dim"): (800, f"{XSUM}: --mid_dim 800"),
    ("mam_adapter", "prefix_dropout"): (
        0.0,
        "jxhe/unify-parameter-efficient-tuning@3222ce2, petl/options.py: prefix_dropout default=0.0, which "
        "exps/run_xsum.sh leaves",
    ),
    ("mam_adapter", "ffn_bottleneck"): (512, f"{XSUM}: ffn_bn=512 under MAM adapter"),
    ("mam_adapter", "ffn_scale"): (4.0, f'{XSUM}: ffn_adapter_scalar="4" under MAM adapter'),
    ("mam_adapter", "ffn_dropout"): (
        0.0,
        "jxhe/unify-parameter-efficient-tuning@3222ce2, src/transformers/models/bart/modeling_bart.py: "
        "Adapter_Layer(dropout=self.dropout), the model's own; ours is 0.0, and no reason is written",
    ),
    ("propetl", "bottleneck"): (64, f"{PROPETL}scripts/run_adapter.sh: adapter_reduction_factor=12, of 768"),
    ("propetl", "kept"): (0.5, f"{PROPETL}scripts/run_adapter.sh: sparsity=0.5, of which GetSubnet keeps as much"),
    ("propetl", "masks"): ("learned", f"{PROPETL}src/transformers/adapters/modeling.py: AdapterSubnet has scores"),
    ("propetl", "mask_ratio"): (
        30.0,
        f"{PROPETL}scripts/run_adapter.sh: mask_lr=3e-3 beside --learning_rate 1e-4",
    ),
    ("propetl", "placement"): (
        "auto",
        f"{PROPETL}scripts/run_adapter.sh: adapter_config=pfeiffer, on RoBERTa; ours is as the host is, as "
        "pfeiffer_adapter has it",
    ),
    ("propetl", "init_std"): (0.02, f"{PROPETL}src/transformers/adapters/modeling.py: init_bert_weights, std=0.02"),
    ("propetl", "up_init_std"): (0.02, f"{PROPETL}src/transformers/adapters/modeling.py: init_bert_weights, std=0.02"),
    ("unipelt", "gate"): (
        "token",
        "morningmoni/UniPELT@53d3c35, transformers/models/bert/modeling_bert.py: torch.mean of the gate over dim=1; "
        "ours is a gate for each token because a mean sees what comes later",
    ),
    ("unipelt", "rank"): (8, f"{UNIPELT}: lora_r default=8"),
    ("unipelt", "prefix_length"): (10, f"{UNIPELT}: prefix_len default=10"),
    ("unipelt", "prefix_mid_dim"): (512, f"{UNIPELT}: mid_dim default=512"),
    ("unipelt", "adapter_reduction"): (
        16,
        "morningmoni/UniPELT@53d3c35, transformers/adapters/configuration.py: reduction_factor = 16 of pfeiffer, which "
        "transformers/adapters/training.py names and leaves",
    ),
}

FREE: Free = {}


@pytest.mark.parametrize(("method", "option", "row"), rows(HELD, FREE))
def test_default(method: str, option: str, row: Any) -> None:
    assert_as_said(method, option, row)
