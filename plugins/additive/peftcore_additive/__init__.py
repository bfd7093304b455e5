"""Additive methods of peftcore: new modules that are added to frozen models."""

from collections.abc import Mapping

from peftcore.author import Preset, hookimpl
from peftcore_additive._presets import PRESETS

PEFTCORE_API = 2


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Map the names of this plugin's methods to their import paths."""
    return {
        "adapterdrop": "peftcore_additive.adapterdrop:AdapterDrop",
        "apt": "peftcore_additive.apt:APT",
        "attention_fusion": "peftcore_additive.attention_fusion:AttentionFusion",
        "cartridge": "peftcore_additive.cartridge:Cartridge",
        "ciat": "peftcore_additive.ciat:CIAT",
        "coda": "peftcore_additive.coda:CoDA",
        "compacter": "peftcore_additive.compacter:Compacter",
        "cpt": "peftcore_additive.cpt:CPT",
        "dept": "peftcore_additive.dept:DePT",
        "houlsby_adapter": "peftcore_additive.houlsby_adapter:HoulsbyAdapter",
        "ia3": "peftcore_additive.ia3:IA3",
        "idpg": "peftcore_additive.idpg:IDPG",
        "infoprompt": "peftcore_additive.infoprompt:InfoPrompt",
        "k_adapter": "peftcore_additive.k_adapter:KAdapter",
        "llama_adapter": "peftcore_additive.llama_adapter:LlamaAdapter",
        "loreft": "peftcore_additive.loreft:LoReFT",
        "lpt": "peftcore_additive.lpt:LPT",
        "lst": "peftcore_additive.lst:LST",
        "madx_invertible": "peftcore_additive.madx_invertible:MadxInvertible",
        "p_tuning": "peftcore_additive.p_tuning:PTuning",
        "p_tuning_v2": "peftcore_additive.p_tuning_v2:PTuningV2",
        "parallel_adapter": "peftcore_additive.parallel_adapter:ParallelAdapter",
        "pfeiffer_adapter": "peftcore_additive.pfeiffer_adapter:PfeifferAdapter",
        "prefix_propagation": "peftcore_additive.prefix_propagation:PrefixPropagation",
        "prefix_tuning": "peftcore_additive.prefix_tuning:PrefixTuning",
        "prompt_tuning": "peftcore_additive.prompt_tuning:PromptTuning",
        "res_tuning": "peftcore_additive.res_tuning:ResTuning",
        "shadow": "peftcore_additive.shadow:Shadow",
        "side_tuning": "peftcore_additive.side_tuning:SideTuning",
        "smop": "peftcore_additive.smop:SMoP",
        "sparse_adapter": "peftcore_additive.sparse_adapter:SparseAdapter",
        "spt_selective": "peftcore_additive.spt_selective:SPTSelective",
        "ssf": "peftcore_additive.ssf:SSF",
        "state_offset_tuning": "peftcore_additive.state_offset_tuning:StateOffsetTuning",
        "tiny_attention_adapter": "peftcore_additive.tiny_attention_adapter:TinyAttentionAdapter",
    }


@hookimpl
def peftcore_presets() -> Mapping[str, Preset]:
    """Map preset names, as papers use them, to a method with options."""
    return PRESETS


@hookimpl
def peftcore_translations() -> Mapping[str, str]:
    """Map other libraries' adapter formats to the import paths of their translations for this plugin's methods."""
    here = "peftcore_additive.interop"
    return {
        "adapterhub/bottleneck": f"{here}.adapterhub:HubBottleneck",
        "adapterhub/lora scale": f"{here}.adapterhub:HubIA3",
        "kohya/ia3": f"{here}.kohya_ia3:KohyaIA3",
        "adapterhub/prefix_tuning": f"{here}.adapterhub_prompts:HubPrefix",
        "adapterhub/prompt_tuning": f"{here}.adapterhub_prompts:HubPrompt",
        "adapterhub/reft": f"{here}.adapterhub_reft:HubReft",
        "peft/ADAPTION_PROMPT": f"{here}.peft_adaption:PeftAdaptionPrompt",
        "peft/CARTRIDGE": f"{here}.peft_prompts:PeftCartridge",
        "peft/CPT": f"{here}.peft_prompts:PeftCPT",
        "peft/IA3": f"{here}.peft_ia3:PeftIA3",
        "peft/P_TUNING": f"{here}.peft_prompts:PeftPTuning",
        "peft/PREFIX_TUNING": f"{here}.peft_prompts:PeftPrefix",
        "peft/PROMPT_TUNING": f"{here}.peft_prompts:PeftPrompt",
        "peft/SHADOW": f"{here}.peft_shadow:PeftShadow",
    }
