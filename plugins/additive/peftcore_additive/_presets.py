"""Presets of this plugin: names of papers for options of methods, a line each."""

from peftcore import Preset

FROM_ANOTHER_TASK = (
    "train prompt_tuning on another task and save it; here peftcore.load(model, folder, trainable=True) goes on from "
    "there"
)

PRESETS = {
    "compacter_pp": Preset("compacter", "2106.04647", {"placement": "compacter_pp"}),
    "direft": Preset("loreft", "2404.03592", {"kind": "direft"}),
    "dpt_lowrank": Preset("prompt_tuning", "2310.10094", {"length": 100, "init": "uniform", "rank": 10}),
    "hadamard_adapter": Preset("ssf", "2407.11033", {"init_std": 0.0}, target="attn.output", train=("norm",)),
    "noreft": Preset("loreft", "2404.03592", {"kind": "noreft"}),
    "phm_adapter": Preset("compacter", "2102.08597", {"shared_rule": False, "factorized": False, "rule_std": 0.01}),
    "ppt": Preset("prompt_tuning", "2109.04332", workflow=FROM_ANOTHER_TASK),
    "red": Preset("ssf", "2402.15179", {"init_std": 0.0}, target="mlp.output"),
    "residual_prompt_tuning": Preset("p_tuning", "2305.03937", {"length": 10, "encoder": "residual", "hidden": 800}),
    "scaled_parallel_learned": Preset("parallel_adapter", "2110.04366", {"scale": "learned"}),
}
