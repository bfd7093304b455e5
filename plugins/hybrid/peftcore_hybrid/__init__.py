"""Hybrid methods of peftcore: several methods as one adapter."""

from collections.abc import Mapping

from peftcore.author import Preset, hookimpl
from peftcore_hybrid._presets import PRESETS

PEFTCORE_API = 2


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Map the names of this plugin's methods to their import paths."""
    return {
        "adamix": "peftcore_hybrid.adamix:AdaMix",
        "config_union": "peftcore_hybrid.config_union:ConfigUnion",
        "glora": "peftcore_hybrid.glora:GLoRA",
        "mam_adapter": "peftcore_hybrid.mam_adapter:MAMAdapter",
        "propetl": "peftcore_hybrid.propetl:ProPETL",
        "unipelt": "peftcore_hybrid.unipelt:UniPELT",
    }


@hookimpl
def peftcore_presets() -> Mapping[str, Preset]:
    """Return the presets of this plugin: names from papers for methods with certain options."""
    return PRESETS


@hookimpl
def peftcore_translations() -> Mapping[str, str]:
    """Map other libraries' adapter formats to the import paths of their translations for this plugin's methods."""
    here = "peftcore_hybrid.interop"
    return {
        "kohya/glora": f"{here}.kohya_glora:KohyaGLoRA",
        "kohya/ia3 beside a bias": f"{here}.kohya_gains:KohyaGains",
        "peft/GLORA": f"{here}.peft_glora:PeftGLoRA",
    }
