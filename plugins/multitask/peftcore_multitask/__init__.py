"""Multi-task methods of peftcore: skills, routers and compositions that several tasks share."""

from collections.abc import Mapping

from peftcore import gather
from peftcore.author import Preset, hookimpl
from peftcore_multitask._presets import PRESETS

PEFTCORE_API = 2
__all__ = ["PEFTCORE_API", "gather", "peftcore_formats", "peftcore_methods", "peftcore_translations"]


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Map the names of this plugin's methods to their import paths."""
    return {
        "adapter_fusion": "peftcore_multitask.adapter_fusion:AdapterFusion",
        "adapter_soup": "peftcore_multitask.adapter_soup:AdapterSoup",
        "arrow": "peftcore_multitask.arrow:Arrow",
        "attempt": "peftcore_multitask.attempt:Attempt",
        "dare": "peftcore_multitask.dare:DARE",
        "hydralora": "peftcore_multitask.hydralora:HydraLoRA",
        "hyperformer_pp": "peftcore_multitask.hyperformer_pp:HyperFormer",
        "loramoe": "peftcore_multitask.loramoe:LoRAMoE",
        "mixlora": "peftcore_multitask.mixlora:MixLoRA",
        "moa_adapters": "peftcore_multitask.moa_adapters:MoAAdapters",
        "moelora": "peftcore_multitask.moelora:MOELoRA",
        "mola": "peftcore_multitask.mola:MoLA",
        "mole": "peftcore_multitask.mole:MoLE",
        "molora_moe": "peftcore_multitask.molora_moe:MoLoRA",
        "mov": "peftcore_multitask.mov:MoV",
        "mtl_lora": "peftcore_multitask.mtl_lora:MTLLoRA",
        "multitask_prompt_tuning": "peftcore_multitask.multitask_prompt_tuning:MultitaskPromptTuning",
        "pal": "peftcore_multitask.pal:PAL",
        "pha": "peftcore_multitask.pha:PHA",
        "polyhistor": "peftcore_multitask.polyhistor:Polyhistor",
        "polytropon": "peftcore_multitask.polytropon:Polytropon",
        "regmean": "peftcore_multitask.regmean:RegMean",
        "sapt": "peftcore_multitask.sapt:SAPT",
        "task_arithmetic": "peftcore_multitask.task_arithmetic:TaskArithmetic",
        "text_to_lora": "peftcore_multitask.text_to_lora:TextToLoRA",
        "ties_merging": "peftcore_multitask.ties_merging:TIESMerging",
        "vl_adapter": "peftcore_multitask.vl_adapter:VLAdapter",
        "xlora": "peftcore_multitask.xlora:XLoRA",
    }


@hookimpl
def peftcore_presets() -> Mapping[str, Preset]:
    """Return the presets of this plugin: names from papers for methods with certain options."""
    return PRESETS


@hookimpl
def peftcore_formats() -> Mapping[str, str]:
    """Map the names of the file formats of this plugin to their import paths."""
    return {"adapterhub_fusion": "peftcore_multitask.interop.adapterhub_fusion:AdapterHubFusion"}


@hookimpl
def peftcore_translations() -> Mapping[str, str]:
    """Map other libraries' adapter formats to the import paths of their translations for this plugin's methods."""
    return {
        "peft/MULTITASK_PROMPT_TUNING": "peftcore_multitask.interop.peft_multitask_prompt:PeftMultitaskPrompt",
        "peft/POLY": "peftcore_multitask.interop.peft_poly:PeftPoly",
        "peft/XLORA": "peftcore_multitask.interop.peft_xlora:PeftXLoRA",
    }
