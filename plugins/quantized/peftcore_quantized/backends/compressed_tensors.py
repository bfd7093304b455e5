"""compressed-tensors: its layers are refused, with an error that says how to load the model instead.

It compresses plain linear layers in place, has the weight in other tensors until the first forward, and rounds it in
each forward from then on, an adapter's change with it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from peftcore.author import Layer, hookimpl
from peftcore.errors import UnsupportedSite

PEFTCORE_API = 2
SCHEME = "quantization_scheme"
"""The attribute by which its layers are known."""


@hookimpl
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Return None if compressed-tensors did not quantize the module. The library is looked up, not imported.

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
