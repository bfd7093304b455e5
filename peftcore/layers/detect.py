"""Finds the `Layer` of a module's dense tensor by the module's class and the tensor's dimensions. The core's
implementation of the hook `peftcore_layer` uses this module. It runs after the implementations of all plugins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from peftcore.layers.fsdp import MANAGED
from peftcore.layers.kinds import PRODUCTS, Conv, ConvTransposed, Linear, Opaque, Table, Transposed
from peftcore.layers.layer import Layer, is_dense, plain_class
from peftcore.layers.tensor_parallel import parallel_linear


def _runs(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module's forward is the forward of one of the classes `kinds`.

    Subclasses with another forward may use their tensors in another way, such as scaled embeddings (Gemma) and
    standardized or self-padding convolutions (timm). Operators then act on their weight instead of on activations.
    """
    return any(plain_class(module).forward is kind.forward for kind in kinds)


def _conv(module: _ConvNd) -> Layer:
    plain = module.groups == 1 and module.padding_mode == "zeros" and _runs(module, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
    return Conv(called=plain, stride=module.stride, padding=padding, dilation=module.dilation)


def _embedding(module: nn.Embedding) -> Layer:
    plain = _runs(module, nn.Embedding)
    simple = module.max_norm is None and not module.scale_grad_by_freq
    return Table(called=plain and simple, one_hot=True, padding_idx=module.padding_idx)


_KINDS: dict[type, Callable[[Any], Layer]] = {
    nn.Linear: lambda module: Linear(called=_runs(module, nn.Linear)),
    nn.Embedding: _embedding,
    _ConvNd: _conv,
    _ConvTransposeNd: lambda module: ConvTransposed(groups=module.groups),
}


def _kinds() -> dict[type, Callable[[Any], Layer]]:
    """Returns the known classes of modules. Conv1D of transformers is added only if transformers is imported: otherwise
    no module can be a Conv1D."""
    utils = sys.modules.get("transformers.pytorch_utils")
    if utils is not None and utils.Conv1D not in _KINDS:
        _KINDS[utils.Conv1D] = lambda module: Transposed(called=_runs(module, utils.Conv1D))
        PRODUCTS.add(utils.Conv1D.forward)
    return _KINDS


def dense_layer(module: nn.Module, tensor: str) -> Layer:
    """Returns the layer of a dense tensor: for a `weight`, by the class of the module that holds it; for other tensors,
    by their dimensions. For a tensor of a child module, the layer has the child's storage layout, and `called` is
    False."""
    path, _, name = tensor.rpartition(".")
    owner = module.get_submodule(path)
    held = getattr(owner, name, None)
    if isinstance(owner, nn.Linear) and MANAGED not in vars(owner):
        parallel = parallel_linear(owner, name, _runs(owner, nn.Linear) and owner is module)
        if parallel is not None:
            return parallel
    if isinstance(held, Tensor) and not is_dense(held):
        return Opaque(called=owner is module)
    if name == "weight":
        kinds = _kinds()
        for cls in type(owner).__mro__:
            if cls in kinds:
                layer = kinds[cls](owner)
                return layer if owner is module else replace(layer, called=False)
    if isinstance(held, Tensor) and held.dim() == 3:
        return Transposed(batch_dims=1) if stacked_transposed(owner) else Layer(batch_dims=1)
    return Layer()


def stacked_transposed(module: nn.Module) -> bool:
    """Whether a module stores its stacked expert weights as ``[experts, in, out]`` instead of ``[experts, out, in]``.
    If the module has transformers' attribute `is_transposed`, that decides. Otherwise the shapes of two stacks decide:
    the fused gate and up projection, and the down projection (Llama 4)."""
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    stacks = [each.shape for each in module._parameters.values() if each is not None and each.dim() == 3]
    return any(one == (other[0], other[2], 2 * other[1]) for one in stacks for other in stacks)
