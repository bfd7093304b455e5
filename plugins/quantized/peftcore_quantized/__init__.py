"""Quantized methods of peftcore, and the schemes that quantize weights (in `backends`, each a separate plugin)."""

from collections.abc import Mapping

from peftcore.author import Preset, hookimpl
from peftcore_quantized._presets import PRESETS

PEFTCORE_API = 2


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Map the names of this plugin's methods to their import paths."""
    return {
        "bi_adaptformer": "peftcore_quantized.bi_adaptformer:BiAdaptFormer",
        "ir_qlora": "peftcore_quantized.ir_qlora:IRQLoRA",
        "loftq": "peftcore_quantized.loftq:LoftQ",
        "lora_int8": "peftcore_quantized.lora_int8:LoRAInt8",
        "lq_lora": "peftcore_quantized.lq_lora:LQLoRA",
        "lqer": "peftcore_quantized.lqer:LQER",
        "peqa": "peftcore_quantized.peqa:PEQA",
        "qa_lora": "peftcore_quantized.qa_lora:QALoRA",
        "qlora": "peftcore_quantized.qlora:QLoRA",
        "qpissa": "peftcore_quantized.qpissa:QPiSSA",
    }


@hookimpl
def peftcore_presets() -> Mapping[str, Preset]:
    """Map the names of presets to a method and its options."""
    return PRESETS
