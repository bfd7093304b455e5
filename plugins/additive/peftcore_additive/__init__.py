"""Additive methods of peftcore: new modules beside frozen ones."""

from collections.abc import Mapping

from peftcore import hookimpl

PEFTCORE_API = 1


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Names and places of this plugin's methods."""
    return {
        "houlsby_adapter": "peftcore_additive.houlsby_adapter:HoulsbyAdapter",
        "ia3": "peftcore_additive.ia3:IA3",
    }
