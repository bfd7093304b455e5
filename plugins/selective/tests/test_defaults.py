"""Defaults of selective methods, and what fixes them."""

from typing import Any

import pytest
from named_defaults import Free, Held, assert_as_said, rows

CHILD = "RunxinXu/ChildTuning@d0d8655"
DEIT = "facebookresearch/deit@7e160fe, main.py"
FISH = "varunnair18/FISH@b5bff1e, README.md"
VPT = "KMnP/vpt@4410440"

HELD: Held = {
    ("attention_only", "include_bias"): (True, f"{DEIT}: --attn-only trains all parameters with '.attn.' in the name"),
    ("attention_only", "head"): (True, f"{DEIT}: with --attn-only model.head.weight.requires_grad = True"),
    ("attention_only", "positions"): (True, f"{DEIT}: with --attn-only model.pos_embed.requires_grad = True"),
    ("bitfit", "head"): (
        True,
        "benzakenelad/BitFit@7ead19a, glue_evaluator.py: trainable_components = trainable_components + ['classifier']",
    ),
    ("child_tuning_d", "share"): (0.3, f"{CHILD}, run.sh: REVERSE_P=0.3, given as --reserve_p"),
    ("child_tuning_d", "max_grad_norm"): (
        1.0,
        f"{CHILD}, ChildTuningD.py: clip_grad_norm_(params, self.args.max_grad_norm), which run.sh leaves at "
        "transformers' 1.0",
    ),
    ("fish_mask", "share"): (0.005, f"{FISH}: run_sparse_updates.sh ... 0 0.005 1024, the third is top_k_percentage"),
    ("fish_mask", "samples"): (1024, f"{FISH}: run_sparse_updates.sh ... 0 0.005 1024, num_samples_for_fisher"),
    ("partial_k", "k"): (1, f'{VPT}, demo.ipynb: MODEL.TRANSFER_TYPE "partial-1"'),
    ("shira", "rank"): (32, "peft 0.21: ShiraConfig.r"),
    ("shira", "mask"): ("random", "peft 0.21: ShiraConfig.mask_type"),
    ("shira", "sparsity"): (
        None,
        "peft 0.21: SupertuningConfig.sparsity is 0.99, as in the preset; ours is None, since SHiRA counts by a rank",
    ),
    ("shira", "low_rank"): (0, "peft 0.21: SupertuningConfig.r is None"),
    ("shira", "alpha"): (16.0, "peft 0.21: SupertuningConfig.lora_alpha is 2 * r, and 8 is LoRA's rank"),
}

FREE: Free = {}


@pytest.mark.parametrize(("method", "option", "row"), rows(HELD, FREE))
def test_default(method: str, option: str, row: Any) -> None:
    assert_as_said(method, option, row)
