"""Vision methods of peftcore: prompts and adapters for image models."""

from collections.abc import Mapping

from peftcore import hookimpl

PEFTCORE_API = 1


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Names and places of this plugin's methods."""
    return {
        "adaptformer": "peftcore_vision.adaptformer:AdaptFormer",
        "clip_adapter": "peftcore_vision.clip_adapter:CLIPAdapter",
        "coop": "peftcore_vision.coop:CoOp",
        "vpt_deep": "peftcore_vision.vpt_deep:VPTDeep",
        "vpt_shallow": "peftcore_vision.vpt_shallow:VPTShallow",
    }
