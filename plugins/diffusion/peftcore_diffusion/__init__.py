"""Diffusion methods of peftcore: concepts, conditions and control for image generators."""

from collections.abc import Mapping

from peftcore.author import Preset, hookimpl
from peftcore_diffusion._presets import PRESETS

PEFTCORE_API = 2


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Map the names of this plugin's methods to their import paths."""
    return {
        "controlnet": "peftcore_diffusion.controlnet:ControlNet",
        "controlnet_lllite": "peftcore_diffusion.controlnet_lllite:ControlNetLLLite",
        "controlnet_lora": "peftcore_diffusion.controlnet_lora:ControlNetLoRA",
        "controlnext": "peftcore_diffusion.controlnext:ControlNeXt",
        "controlnet_xs": "peftcore_diffusion.controlnet_xs:ControlNetXS",
        "custom_diffusion": "peftcore_diffusion.custom_diffusion:CustomDiffusion",
        "difffit": "peftcore_diffusion.difffit:DiffFit",
        "ed_lora": "peftcore_diffusion.ed_lora:EDLoRA",
        "hypernetwork_a1111": "peftcore_diffusion.hypernetwork_a1111:HypernetworkA1111",
        "ip_adapter": "peftcore_diffusion.ip_adapter:IPAdapter",
        "lidb": "peftcore_diffusion.lidb:LiDB",
        "locon": "peftcore_diffusion.locon:LoCon",
        "ominicontrol": "peftcore_diffusion.ominicontrol:OminiControl",
        "scedit": "peftcore_diffusion.scedit:SCEdit",
        "svdiff": "peftcore_diffusion.svdiff:SVDiff",
        "t2i_adapter": "peftcore_diffusion.t2i_adapter:T2IAdapter",
        "tlora": "peftcore_diffusion.tlora:TLoRA",
        "perfusion": "peftcore_diffusion.perfusion:Perfusion",
        "textual_inversion": "peftcore_diffusion.textual_inversion:TextualInversion",
        "xti": "peftcore_diffusion.xti:XTI",
    }


@hookimpl
def peftcore_presets() -> Mapping[str, Preset]:
    """Map preset names, as papers use them, to a method with options."""
    return PRESETS


@hookimpl
def peftcore_formats() -> Mapping[str, str]:
    """Map the file formats that this plugin reads and writes to their import paths."""
    return {
        "control_lora": "peftcore_diffusion.interop.control_lora:ControlLoRA",
        "embeddings": "peftcore_diffusion.interop.embeddings:Embeddings",
    }


@hookimpl
def peftcore_translations() -> Mapping[str, str]:
    """Map other libraries' adapter formats to the import paths of their translations for this plugin's methods."""
    here = "peftcore_diffusion.interop"
    return {
        "kohya/locon": f"{here}.kohya_locon:KohyaLoCon",
        "kohya/textual_inversion": f"{here}.kohya_textual_inversion:KohyaTextualInversion",
        "kohya/tlora_masked": f"{here}.kohya_tlora:KohyaMaskedTLoRA",
    }
