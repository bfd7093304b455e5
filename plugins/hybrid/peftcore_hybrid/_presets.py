"""Presets of this plugin: names of papers for options of methods, a line each."""

from peftcore import Preset

# Its query prompts are left out: what comes out at their rows is dropped, so they would change nothing.
APROMPT = [
    {"method": "prompt_tuning", "length": 20},
    {"method": "prefix_tuning", "length": 5, "projection": None, "behind": False},
]
LLAMA_ADAPTER_V2 = [
    {"method": "llama_adapter"},
    {"method": "ln_tuning"},
    {"method": "bitfit", "add_missing_bias": True, "head": False, "target": "all-linear"},
    {"method": "ia3", "scale_inputs": ["*"], "target": "all-linear"},
]
RLRR = [
    {"method": "hira", "rank": 1, "target": "all-linear"},
    {"method": "bitfit", "add_missing_bias": True, "head": False, "target": "all-linear"},
    {"method": "ssf", "target": "norm"},
]
S4 = (
    "four groups of layers, the middle ones larger, each with a method of its own: peftcore.apply(model, [...]) with a "
    'part for each, such as {"method": "lora", "target": r"re:.*layers\\.[0-3]\\..*"}'
)

MOVED = {"identity_at_init": False}
PRESETS = {
    "aprompt": Preset("config_union", "EMNLP 2023", {"parts": APROMPT}, claims=MOVED),
    "compacter_hybrid": Preset("compacter", "2106.04647"),
    "llama_adapter_v2": Preset("config_union", "2304.15010", {"parts": LLAMA_ADAPTER_V2}),
    "madx": Preset(
        "config_union",
        "2005.00052",
        {"parts": [{"method": "madx_invertible"}, {"method": "pfeiffer_adapter"}]},
        claims=MOVED,
    ),
    "rlrr": Preset("config_union", "2403.19067", {"parts": RLRR}, claims=MOVED),
    "s4": Preset("config_union", "2301.01821", workflow=S4),
    "sparse_combos": Preset("config_union", "2401.04679", {"parts": [{"method": "lora"}, {"method": "shira"}]}),
}
