"""Presets of this plugin: names that papers use for a method with certain options."""

from peftcore.author import Preset

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.out", "cross.q", "cross.k", "cross.v", "cross.out")
ALL = "all-layers"
IA3 = ("attn.k", "attn.v", "cross.k", "cross.v", "mlp.down")
B_LORA = r"re:.*up_blocks\.0\.attentions\.[01]\..*to_(q|k|v|out\.0)"
B_LORA_START = "A starts as LoRA's does; the authors' from N(0, 1/64^2)."
IN_A_UNET = "The method at the layers of a UNet: its paper has language models alone."
OF_LYCORIS = "OFT of outputs at all layers, as the LyCORIS package has it, whose paper does not compare it."

PRESETS = {
    "b_lora": Preset("lora", "2403.14572", {"rank": 64, "alpha": 64.0}, target=B_LORA, note=B_LORA_START),
    "boft_unet": Preset("boft", "2311.06243", target=ATTENTION),
    "diag_oft": Preset("oft", "2306.07280", {"side": "outputs", "block_size": 4}, target=ALL, note=OF_LYCORIS),
    "diffit_combo": Preset("difffit", "2304.06648", {"classes": False}),
    "dora_diffusion": Preset("dora", "2402.09353", target=ATTENTION),
    "dylora_unet": Preset("dylora", "2210.07558", target=ALL, note=IN_A_UNET),
    "full_diff": Preset("linear_probe", "2309.14859", target="*"),
    "ia3_unet": Preset("ia3", "2205.05638", target=IA3, note=IN_A_UNET),
    "loha_unet": Preset("loha", "2309.14859", target=ALL),
    "lokr_unet": Preset("lokr", "2309.14859", target=ALL),
    "lora_dit": Preset(
        "lora",
        "2106.09685",
        target=ATTENTION,
        note="LoRA at the attention of a diffusion transformer: its paper has language models alone.",
    ),
    "lora_unet": Preset("lora", "2106.09685", target=ATTENTION, note=IN_A_UNET),
    "oft_unet": Preset("oft", "2306.07280", target=ATTENTION),
    "te_lora": Preset("lora", "2309.14859", target=ATTENTION),
}
