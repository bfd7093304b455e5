"""Reparameterized methods of peftcore: low-rank and other structured updates of frozen weights."""

from collections.abc import Mapping

from peftcore import hookimpl

PEFTCORE_API = 1


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Names and places of this plugin's methods."""
    return {
        "adalora": "peftcore_reparameterized.adalora:AdaLoRA",
        "dora": "peftcore_reparameterized.dora:DoRA",
        "galore": "peftcore_reparameterized.galore:GaLore",
        "lora": "peftcore_reparameterized.lora:LoRA",
        "lora_plus": "peftcore_reparameterized.lora_plus:LoRAPlus",
    }
