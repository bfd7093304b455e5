"""Presets of this plugin: names of papers for options of methods, a line each."""

from peftcore import Preset

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.out", "cross.q", "cross.k", "cross.v", "cross.out")
ALL = "all-layers"

PRESETS = {
    "b_lora": Preset("lora", "2403.14572", target=r"re:.*up_blocks\.0\.attentions\.[01]\..*to_(q|k|v|out\.0)"),
    "boft_unet": Preset("boft", "2311.06243", target=ATTENTION),
    "diag_oft": Preset("oft", "2309.14859", {"side": "outputs", "block_size": 4}, target=ALL),
    "diffit_combo": Preset("difffit", "2304.06648", {"classes": False}),
    "dora_diffusion": Preset("dora", "2402.09353", target=ATTENTION),
    "dylora_unet": Preset("dylora", "2210.07558", target=ALL),
    "full_diff": Preset("linear_probe", "2309.14859", target="*"),
    "ia3_unet": Preset("ia3", "2309.14859", target=("attn.k", "attn.v", "cross.k", "cross.v", "mlp.down")),
    "loha_unet": Preset("loha", "2309.14859", target=ALL),
    "lokr_unet": Preset("lokr", "2309.14859", target=ALL),
    "lora_dit": Preset("lora", "2212.09748", target=ATTENTION),
    "lora_unet": Preset("lora", "2106.09685", target=ATTENTION),
    "oft_unet": Preset("oft", "2306.07280", target=ATTENTION),
    "te_lora": Preset("lora", "2309.14859", target=ATTENTION),
}
