"""Hybrid methods of peftcore: several methods as one adapter."""

from collections.abc import Mapping

from peftcore import hookimpl

PEFTCORE_API = 2


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Names and places of this plugin's methods."""
    return {
        "config_union": "peftcore_hybrid.config_union:ConfigUnion",
        "glora": "peftcore_hybrid.glora:GLoRA",
        "mam_adapter": "peftcore_hybrid.mam_adapter:MAMAdapter",
        "unipelt": "peftcore_hybrid.unipelt:UniPELT",
    }


@hookimpl
def peftcore_translations() -> Mapping[str, str]:
    """How other libraries' files keep this plugin's methods."""
    return {"peft/GLORA": "peftcore_hybrid.interop.peft_glora:PeftGLoRA"}
