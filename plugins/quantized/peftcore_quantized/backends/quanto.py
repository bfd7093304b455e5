"""optimum-quanto: linear layers of models that transformers loaded with a `QuantoConfig`, or that quanto has frozen."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Layer, QuantizedLayer, hookimpl, quantized_layer_of
from peftcore.errors import UnsupportedHost

PEFTCORE_API = 2


@dataclass(frozen=True)
class QuantoLayer(QuantizedLayer):
    """Reads `QLinear` for the core. These modules can be neither quantized nor dequantized in place, so merging into
    them is impossible."""

    @property
    def saves_dense(self) -> bool:
        return True

    def unpack(self, module: Any) -> Tensor:
        return module.weight.dequantize()

    def dtype(self, module: Any) -> torch.dtype | None:
        return module.weight.dtype

    def check_cut(self, module: nn.Module) -> None:
        raise UnsupportedHost(
            "torch cannot shard modules of quanto: keep the whole model in every process, or quantize with nf4, int8, "
            "int4, bnb-nf4 or hqq-4"
        )


@hookimpl
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Return the layer of a module that quanto has quantized, else None. This function does not import quanto. If it is
    not imported elsewhere, the module cannot be a quanto layer. Until quanto has frozen a module, the weight is dense,
    and the core reads it directly."""
    quanto = sys.modules.get("optimum.quanto.nn")
    owner: Any = module.get_submodule(tensor.rpartition(".")[0])
    if quanto is None or not isinstance(owner, quanto.QLinear) or not owner.frozen:
        return None
    return quantized_layer_of(module, tensor, QuantoLayer())
