"""Selective methods of peftcore: some of the host's own tensors train, as replacement values."""

from collections.abc import Mapping

from peftcore.author import Preset, hookimpl
from peftcore_selective._presets import PRESETS

PEFTCORE_API = 2


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Map the names of this plugin's methods to their import paths."""
    return {
        "attention_only": "peftcore_selective.attention_only:AttentionOnly",
        "bitfit": "peftcore_selective.bitfit:BitFit",
        "child_tuning_d": "peftcore_selective.child_tuning_d:ChildTuningD",
        "fish_mask": "peftcore_selective.fish_mask:FishMask",
        "linear_probe": "peftcore_selective.linear_probe:LinearProbe",
        "ln_tuning": "peftcore_selective.ln_tuning:LNTuning",
        "partial_k": "peftcore_selective.partial_k:PartialK",
        "shira": "peftcore_selective.shira:SHiRA",
        "trainable_tokens": "peftcore_selective.trainable_tokens:TrainableTokens",
    }


@hookimpl
def peftcore_presets() -> Mapping[str, Preset]:
    """Return the presets of this plugin: names from papers for methods with certain options."""
    return PRESETS


@hookimpl
def peftcore_translations() -> Mapping[str, str]:
    """Map other libraries' adapter formats to the import paths of their translations for this plugin's methods."""
    return {
        "kohya/full": "peftcore_selective.interop.kohya_replaced:KohyaFull",
        "kohya/norm": "peftcore_selective.interop.kohya_replaced:KohyaNorm",
        "peft/BEFT": "peftcore_selective.interop.peft_beft:PeftBEFT",
        "peft/LN_TUNING": "peftcore_selective.interop.peft_norms:PeftNorms",
        "peft/SHIRA": "peftcore_selective.interop.peft_shira:PeftSHiRA",
        "peft/SUPERTUNING": "peftcore_selective.interop.peft_supertuning:PeftSupertuning",
        "peft/TRAINABLE_TOKENS": "peftcore_selective.interop.peft_tokens:PeftTokens",
    }
