"""Multi-task methods of peftcore: skills, routers and compositions that several tasks share."""

from collections.abc import Mapping

from peftcore import hookimpl

PEFTCORE_API = 1


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Names and places of this plugin's methods."""
    return {
        "hydralora": "peftcore_multitask.hydralora:HydraLoRA",
        "mov": "peftcore_multitask.mov:MoV",
        "multitask_prompt_tuning": "peftcore_multitask.multitask_prompt_tuning:MultitaskPromptTuning",
        "polytropon": "peftcore_multitask.polytropon:Polytropon",
    }
