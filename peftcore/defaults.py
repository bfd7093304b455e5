"""The core's own hook implementations: they come last and call the function of the method at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftcore.hookspecs import hookimpl


class Defaults:
    """Registered as a plugin like any other."""

    @hookimpl(trylast=True)
    def peftcore_map(self, model: nn.Module) -> Any:
        from peftcore.hosts import derive

        return derive(model)

    @hookimpl(trylast=True)
    def peftcore_layer(self, module: nn.Module, tensor: str) -> Any:
        from peftcore.layers import dense_layer

        return dense_layer(module, tensor)

    @hookimpl(trylast=True)
    def peftcore_stance(self, cls: type[nn.Module]) -> Any:
        from peftcore.stances import STANCES

        return next((stance for known, stance in STANCES.items() if issubclass(cls, known)), None)

    @hookimpl(trylast=True)
    def peftcore_formats(self) -> Mapping[str, str]:
        return {
            "peftcore": "peftcore.interop.native:Native",
            "peft": "peftcore.interop.peft:Peft",
            "adapterhub": "peftcore.interop.adapterhub:AdapterHub",
            "diffusers": "peftcore.interop.diffusers:Diffusers",
            "kohya": "peftcore.interop.kohya:Kohya",
        }

    @hookimpl(trylast=True)
    def peftcore_inject(self, model: nn.Module, method: Any, config: Any, surgeon: Any) -> bool:
        method.inject(model, config, surgeon)
        return True

    @hookimpl(trylast=True)
    def peftcore_select(self, model: nn.Module, method: Any, config: Any, injection: Any) -> bool:
        method.trainable(model, config, injection)
        return True

    @hookimpl(trylast=True)
    def peftcore_merge(self, injection: Any) -> Mapping[tuple[str, str], Tensor]:
        from peftcore.merging import merged_tensors

        return merged_tensors(injection)
