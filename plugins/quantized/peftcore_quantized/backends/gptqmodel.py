"""GPTQ and AWQ: models that transformers loaded with GPT-QModel's kernels.

Kernels store their codes in different layouts, but all of them compute linear maps. So a weight is read as the output
of its module for the identity matrix. Some CPU kernels permanently rearrange their codes in the first forward in
evaluation mode, and have no gradient afterwards. While an adapter is installed, this is prevented. Kernels that support
only inference are refused.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import ForcedAttributes, Layer, QuantizedLayer, hookimpl, quantized_layer_of
from peftcore.errors import ExportError, UnsupportedHost

PEFTCORE_API = 2
ROWS = 512
"""Number of rows of the identity matrix that one call passes to a kernel. Kernels support inputs of this size."""
IN_TRAINING = {"linear_mode": "train"}
"""The attribute of kernels with a training and an inference path, and its value for the path with a gradient."""


def _base() -> Any:
    """Return the base class of GPT-QModel's layers if that library is imported, else None."""
    package = sys.modules.get("gptqmodel.nn_modules.qlinear")
    return None if package is None else package.BaseQuantLinear


@dataclass(frozen=True)
class KernelLayer(QuantizedLayer):
    """Reads linear layers of GPTQ and AWQ for the core. A changed weight cannot be quantized again, because that would
    take calibration data."""

    @property
    def saves_dense(self) -> bool:
        return True

    def unpack(self, module: Any) -> Tensor:
        bare = self.bare(module)
        vars(bare).update({key: value for key, value in IN_TRAINING.items() if key in vars(module)})
        one = torch.eye(module.in_features, dtype=module.scales.dtype, device=module.scales.device)
        with torch.no_grad():
            return torch.cat([bare.forward(rows) for rows in one.split(ROWS)]).T.float()

    def dtype(self, module: Any) -> torch.dtype | None:
        return None  # scales are in half precision in any case

    def check_trains(self, module: Any) -> None:
        name = type(module).__name__
        if not module.SUPPORTS_TRAINING:
            raise UnsupportedHost(
                f"{name} is a kernel for inference that passes no gradient; load the model with GPTQConfig(bits=4, "
                'backend="auto_trainable") or AwqConfig(..., backend="auto_trainable"), or set "backend": '
                '"auto_trainable" in the quantization_config of config.json'
            )
        if vars(module).get("linear_mode") == "inference":
            raise UnsupportedHost(
                f"{name} rearranged its codes for inference when it first ran in evaluation, and passes no gradient "
                "any more; load the model again, and apply the adapter before it runs"
            )

    def check_saves(self, module: Any) -> None:
        if "qzero_format" in dir(module) and module.qzero_format() == 2:
            raise ExportError(
                "GPT-QModel holds GPTQ's zero points in another form than its files do, so save_pretrained would "
                "write a wrong model. Save the adapter alone with injection.save(folder), or a dense model: bake(), "
                "then peftcore.dequantize(model)"
            )


@hookimpl
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Return the layer of a linear layer of GPTQ or AWQ, else None."""
    cls, owner = _base(), module.get_submodule(tensor.rpartition(".")[0])
    return quantized_layer_of(module, tensor, KernelLayer()) if cls is not None and isinstance(owner, cls) else None


@functools.cache
def _held() -> ForcedAttributes:
    return ForcedAttributes(IN_TRAINING)


@hookimpl
def peftcore_forced_attributes(cls: type[nn.Module]) -> ForcedAttributes | None:
    """Return the attribute that prevents the rearranging of codes, or None for other classes. After a rearrangement, a
    module would have no gradient."""
    base = _base()
    return _held() if base is not None and issubclass(cls, base) else None
