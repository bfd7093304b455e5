"""Presets of this plugin. Each line maps a name from a paper to a method with options."""

from peftcore.author import Preset

NO_EMBEDDINGS = "Without the embeddings of a new language, which the paper also trains: train= adds them."

PRESETS = {
    "beft": Preset("bitfit", "2509.15974", {"add_missing_bias": True, "head": False}, target=("attn.v", "cross.v")),
    "embeddings_only": Preset("linear_probe", "classic", target="embed"),
    "full_ft": Preset("linear_probe", "classic", target="*"),
    "supertuning": Preset("shira", "2607.09287", {"mask": "magnitude", "sparsity": 0.99}),
    "xattn_tuning": Preset(
        "attention_only", "2104.08771", {"head": False, "positions": False}, target="cross.*", note=NO_EMBEDDINGS
    ),
}
