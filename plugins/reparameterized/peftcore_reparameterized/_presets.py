"""Presets of this plugin. Each is the name that a paper gives to certain options of a method."""

from peftcore.author import Preset

PRESETS = {
    "krona": Preset("lokr", "2212.10650", {"full_matrix": True}),
    "lora_orthogonal": Preset("lora", "datta0.github.io/posts/rethink-lora-init", {"start": "orthogonal"}),
    "lora_fa": Preset("lora", "2308.03303", {"trained": "B"}),
    "lora_sb": Preset("lora_xs", "2411.19557", {"start": "gradient"}),
    "riemannian_lora": Preset("lora", "2402.02347", {"damping": 1e-6}),
    "rslora": Preset("lora", "2312.03732", {"scaling": "sqrt_rank"}),
}
