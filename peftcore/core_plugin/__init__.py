"""The core's own implementations of the hooks. They run after the implementations of all plugins. For steps of one
method, such as `peftcore_inject`, they call the method's function.

The registry imports this module by name when it is first needed, so no lower package depends on it. It may import
everything that is below the public API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftcore.contract.hookspecs import hookimpl
from peftcore.injection.merging import merged_tensors
from peftcore.layers.detect import dense_layer
from peftcore.roles import derive
from peftcore.surgery.forced_attributes import FORCED_ATTRIBUTES


@hookimpl(trylast=True)
def peftcore_map(model: nn.Module) -> Any:
    return derive(model)


@hookimpl(trylast=True)
def peftcore_layer(module: nn.Module, tensor: str) -> Any:
    return dense_layer(module, tensor)


@hookimpl(trylast=True)
def peftcore_forced_attributes(cls: type[nn.Module]) -> Any:
    return next((forced for known, forced in FORCED_ATTRIBUTES.items() if issubclass(cls, known)), None)


@hookimpl(trylast=True)
def peftcore_formats() -> Mapping[str, str]:
    return {
        "peftcore": "peftcore.files.formats.native:Native",
        "peft": "peftcore.files.formats.peft:Peft",
        "adapterhub": "peftcore.files.formats.adapterhub:AdapterHub",
        "kohya": "peftcore.files.formats.kohya:Kohya",
        "diffusers": "peftcore.files.formats.diffusers:Diffusers",
        "mlx": "peftcore.files.formats.mlx:MLX",
        "gguf": "peftcore.files.formats.gguf:GGUF",
    }


@hookimpl(trylast=True)
def peftcore_inject(model: nn.Module, method: Any, config: Any, surgeon: Any) -> bool:
    method.inject(model, config, surgeon)
    return True


@hookimpl(trylast=True)
def peftcore_select(model: nn.Module, method: Any, config: Any, injection: Any) -> bool:
    method.trainable(model, config, injection)
    return True


@hookimpl(trylast=True)
def peftcore_merge(injection: Any) -> Mapping[tuple[str, str], Tensor]:
    return merged_tensors(injection)
