"""compressed-tensors: layers that this library has quantized are refused. The error explains how to load the model
dequantized.

The library compresses linear layers in place. Until the first forward, the weight is stored as other tensors. From then
on, each forward rounds the weight, and would also round the change that an adapter makes to it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from peftcore.author import Layer, hookimpl
from peftcore.errors import UnsupportedSite

PEFTCORE_API = 2
SCHEME = "quantization_scheme"
"""The attribute that identifies layers quantized by compressed-tensors."""


@hookimpl
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Return None for a module that compressed-tensors has not quantized. This function does not import the library. If
    it is not imported elsewhere, it has not quantized the module.

    Raises:
        UnsupportedSite: compressed-tensors quantized the module.
    """
    package: Any = sys.modules.get("compressed_tensors.quantization")
    owner = module.get_submodule(tensor.rpartition(".")[0])
    if package is not None and isinstance(vars(owner).get(SCHEME), package.QuantizationScheme):
        raise UnsupportedSite(
            "a layer of compressed-tensors rounds its weight in each forward; load the model dequantized: "
            'from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True)), or set "dequantize": '
            "true in the quantization_config of config.json"
        )
    return None
