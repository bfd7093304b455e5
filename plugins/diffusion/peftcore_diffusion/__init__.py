"""Diffusion methods of peftcore: concepts, conditions and control for image generators."""

from collections.abc import Mapping

from peftcore import hookimpl

PEFTCORE_API = 1


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Names and places of this plugin's methods."""
    return {
        "locon": "peftcore_diffusion.locon:LoCon",
        "svdiff": "peftcore_diffusion.svdiff:SVDiff",
    }
