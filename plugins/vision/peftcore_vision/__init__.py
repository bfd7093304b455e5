"""Vision methods of peftcore: prompts and adapters for image models."""

from collections.abc import Mapping

from peftcore.author import Preset, hookimpl
from peftcore_vision._presets import PRESETS

PEFTCORE_API = 2


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Map the names of this plugin's methods to their import paths."""
    return {
        "adaptformer": "peftcore_vision.adaptformer:AdaptFormer",
        "aim": "peftcore_vision.aim:AIM",
        "arc": "peftcore_vision.arc:ARC",
        "clip_adapter": "peftcore_vision.clip_adapter:CLIPAdapter",
        "cocoop": "peftcore_vision.cocoop:CoCoOp",
        "consolidator": "peftcore_vision.consolidator:Consolidator",
        "convpass": "peftcore_vision.convpass:Convpass",
        "coop": "peftcore_vision.coop:CoOp",
        "dtl": "peftcore_vision.dtl:DTL",
        "dyt": "peftcore_vision.dyt:DyT",
        "e2vpt": "peftcore_vision.e2vpt:E2VPT",
        "evp": "peftcore_vision.evp:EVP",
        "fact_tk": "peftcore_vision.fact_tk:FactTK",
        "fact_tt": "peftcore_vision.fact_tt:FactTT",
        "maple": "peftcore_vision.maple:MaPLe",
        "kadaptation": "peftcore_vision.kadaptation:KAdaptation",
        "lorand": "peftcore_vision.lorand:LoRand",
        "mona": "peftcore_vision.mona:Mona",
        "pixel_vp": "peftcore_vision.pixel_vp:PixelVP",
        "repadapter": "peftcore_vision.repadapter:RepAdapter",
        "spt_lora": "peftcore_vision.spt_lora:SPTLoRA",
        "st_adapter": "peftcore_vision.st_adapter:STAdapter",
        "tip_adapter": "peftcore_vision.tip_adapter:TipAdapter",
        "vpt_deep": "peftcore_vision.vpt_deep:VPTDeep",
        "vpt_shallow": "peftcore_vision.vpt_shallow:VPTShallow",
        "vqt": "peftcore_vision.vqt:VQT",
    }


@hookimpl
def peftcore_presets() -> Mapping[str, Preset]:
    """Return the presets of this plugin: names from papers for methods with certain options."""
    return PRESETS
