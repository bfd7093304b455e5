"""Presets of this plugin: names that papers use for a method with certain options."""

from peftcore.author import Preset

FROM_ANOTHER_TASK = (
    "train prompt_tuning on another task and save it; here peftcore.load(model, folder, trainable=True) goes on from "
    "there"
)
LLM_ADAPTERS = {"bottleneck": 256, "activation": "tanh", "bias": False, "init": "normal", "joins": "matrix"}
SERIES = {**LLM_ADAPTERS, "init_std": 0.02, "up_init_std": 0.02, "train_layer_norm": False}
ADAPTER_PLUS = {"placement": "pre", "bottleneck": 8, "activation": "gelu", "scale": "channel", "stochastic_depth": 0.1}
ADAPTER_PLUS |= {"init": "cut", "init_std": 0.01, "up_init_std": 0.01}
FROZEN_HEAD = "Without the paper's first stage, in which the head trains alone."
PHM = "The authors' configuration has phm_dim=12, which divides a width of 768, and not one of 4,096."
PPT = (
    "The second half of PPT, tuning that goes on from a trained prompt; training that prompt on unlabelled text, in "
    "the paper's three formats of tasks, is not here."
)
RESIDUAL = {"activation": "relu", "norm": True, "train_layer_norm": False}

PRESETS = {
    "adapter_plus": Preset("pfeiffer_adapter", "2406.06820", ADAPTER_PLUS, claims={"random": True}),
    "compacter_pp": Preset("compacter", "2106.04647", {"placement": "compacter_pp"}),
    "direft": Preset("loreft", "2404.03592", {"kind": "direft"}),
    "dpt_lowrank": Preset("prompt_tuning", "2310.10094", {"length": 100, "init": "uniform", "rank": 10}),
    "hadamard_adapter": Preset(
        "ssf", "2407.11033", {"init_std": 0.0}, target="attn.output", train=("norm",), note=FROZEN_HEAD
    ),
    "llm_adapters_p": Preset("houlsby_adapter", "2304.01933", SERIES, target="mlp.down"),
    "llm_adapters_parallel": Preset(
        "parallel_adapter",
        "2304.01933",
        {**LLM_ADAPTERS, "scale": 1.0, "reads": "matrix"},
        target=("attn.q", "attn.k", "attn.v"),
        claims={"identity_at_init": False},
    ),
    "llm_adapters_series": Preset(
        "houlsby_adapter",
        "2304.01933",
        {**SERIES, "side": "stream"},
        target=("mlp.gate_up", "mlp.gate", "mlp.up", "mlp.down"),
    ),
    "low_rank_adapter": Preset(
        "compacter", "2106.04647", {"rules": False, "phm_dim": 1}, claims={"identity_options": None}
    ),
    "noreft": Preset("loreft", "2404.03592", {"kind": "noreft"}),
    "phm_adapter": Preset("compacter", "2106.04647", {"shared_rule": False, "factorized": False}, note=PHM),
    "ppt": Preset("prompt_tuning", "2109.04332", workflow=FROM_ANOTHER_TASK, note=PPT),
    "red": Preset("ssf", "2402.15179", {"init_std": 0.0}, target="mlp.output"),
    "residual_adapter_nmt": Preset("houlsby_adapter", "1909.08478", RESIDUAL, target="block"),
    "residual_prompt_tuning": Preset("p_tuning", "2305.03937", {"length": 10, "encoder": "residual", "hidden": 800}),
    "scaled_parallel_learned": Preset("parallel_adapter", "2110.04366", {"scale": "learned"}),
}
