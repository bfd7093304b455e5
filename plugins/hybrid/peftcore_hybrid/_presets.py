"""Presets of this plugin. Each line maps a name from a paper to a method with options."""

from peftcore.author import Preset

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

APROMPT_NOTE = (
    "Without the paper's query prompts: what comes out at their rows is dropped, so that they would change nothing."
)
COMPACTER_NOTE = "Compacter itself, which its paper presents as adapters put together with low-rank Kronecker products."
MADX_NOTE = "The language adapter alone; the adapter of a task is stacked on it, as adapter_stack says."
S4_NOTE = (
    "A way to write S4, not S4 itself: which methods the four groups have is left to you, since the authors' code does "
    "not have it."
)
SPARSE_NOTE = (
    "LoRA beside a sparse update at random entries. RoSA (arXiv 2401.04679) is such a sum, whose entries are chosen by "
    "gradients after a warm-up of LoRA; that choice is not here."
)
V2_NOTE = "What trains on text: the paper's second half, pictures in early layers and their training, is not here."

MOVED = {"identity_at_init": False}
PRESETS = {
    "aprompt": Preset("config_union", "EMNLP 2023", {"parts": APROMPT}, claims=MOVED, note=APROMPT_NOTE),
    "compacter_hybrid": Preset("compacter", "2106.04647", note=COMPACTER_NOTE),
    "llama_adapter_v2": Preset("config_union", "2304.15010", {"parts": LLAMA_ADAPTER_V2}, note=V2_NOTE),
    "madx": Preset(
        "config_union",
        "2005.00052",
        {"parts": [{"method": "madx_invertible"}, {"method": "pfeiffer_adapter"}]},
        claims=MOVED,
        note=MADX_NOTE,
    ),
    "rlrr": Preset("config_union", "2403.19067", {"parts": RLRR}, claims=MOVED),
    "s4": Preset("config_union", "2301.01821", workflow=S4, note=S4_NOTE),
    "sparse_combos": Preset(
        "config_union", "2406.13175", {"parts": [{"method": "lora"}, {"method": "shira"}]}, note=SPARSE_NOTE
    ),
}
