"""Quantized layers: how a quantizer describes its format, and how a module is quantized and made dense in place.

A module is replaced *in place*: it gets the class and state of another module but stays the same object, so containers,
ties, hooks and operators still refer to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.errors import MergeError
from peftcore.forward.class_swap import FORWARDS, become
from peftcore.forward.state.slot import Slot, slot_of
from peftcore.forward.tensors.view import TORCHS
from peftcore.layers.kinds import Linear
from peftcore.layers.layer import Layer, plain_class
from peftcore.registry.plugins import layer_of
from peftcore.utils.journal import Journal


class Dense(nn.Linear):
    """Runs in place of a quantized linear layer when an effective weight replaces the quantized one. Like a quantized
    layer, it accepts inputs of any floating-point dtype and returns outputs of the same dtype."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


@dataclass(frozen=True)
class QuantizedLayer(Linear):
    """A linear layer whose weight is quantized. The author of a quantization format writes a subclass. It stores
    nothing: its methods read everything from the module that they get.

    Override `unpack` and `dtype`, and also `features` and `device` if their defaults do not fit. If the subclass also
    overrides `pack`, injections can be merged into the same format.
    """

    called: bool = True
    """A quantized layer computes its linear map and adds its bias, so an adapter may act on activations."""

    def unpack(self, module: nn.Module) -> Tensor:
        """Returns the weight ``[out, in]`` as the module's forward uses it: a new dense tensor."""
        raise NotImplementedError

    def features(self, module: nn.Module) -> tuple[int, int]:
        """Returns ``(out, in)``, without unpacking."""
        return module.out_features, module.in_features  # type: ignore[return-value]

    def dtype(self, module: nn.Module) -> torch.dtype | None:
        """Returns the dtype that the weight had before it was packed. None if the format does not record that dtype;
        `unpack` then returns float32."""
        raise NotImplementedError

    def device(self, module: nn.Module) -> torch.device:
        """Returns the device of the tensor that `unpack` returns, without unpacking."""
        return next(iter((*module.parameters(), *module.buffers()))).device

    def bare(self, module: nn.Module) -> nn.Module:
        """Returns a module of the unadapted class that shares the tensors of a quantized module, but lacks its bias,
        hooks and adapters. Formats whose `unpack` obtains the weight by running the forward on an identity matrix use
        it.
        """
        new: nn.Module = object.__new__(plain_class(module))
        vars(new).update({key: copy.copy(value) if key in TENSORS else value for key, value in _own(module)})
        for key in TORCHS:
            if key in vars(module) and key not in vars(new):
                vars(new)[key] = type(vars(module)[key])() if "hooks" in key or key == "_modules" else vars(module)[key]
        new._parameters["bias"] = None
        new._buffers.pop("bias", None)
        vars(new).pop("bias", None)
        return new

    def pack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Returns a new module, packed as `module` is, with the weight ``[out, in]`` and no bias.

        Raises:
            MergeError: the format does not override this method.
        """
        raise MergeError(f"{type(module).__name__} cannot be packed again: merge with into='float'")

    # The interface of any layer; it is asked of the other tensors of the module too

    @property
    def packed(self) -> bool:
        return True

    @property
    def runs_dense(self) -> type[nn.Module] | None:
        return Dense

    @property
    def as_stored(self) -> Layer:
        return self

    def slots(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight", "bias")

    def has(self, module: nn.Module, tensor: str) -> bool:
        return tensor.endswith("weight") or super().has(module, tensor)

    def read(self, module: nn.Module, tensor: str) -> Tensor | None:
        owner, _, name = tensor.rpartition(".")
        if name != "weight":
            return super().read(module, tensor)
        with torch.no_grad():
            return self.unpack(module.get_submodule(owner))

    def shape(self, module: nn.Module, tensor: str) -> torch.Size:
        return torch.Size(self.features(module.get_submodule(tensor.rpartition(".")[0])))

    def like(self, module: nn.Module, tensor: str) -> Tensor:
        owner = module.get_submodule(tensor.rpartition(".")[0])
        return torch.empty(0, dtype=self.dtype(owner) or torch.float32, device=self.device(owner))


@dataclass(frozen=True)
class QuantizedBias(Layer):
    """The bias of a quantized layer, which is not quantized. If the layer lacks a bias, a new bias gets the weight's
    dtype."""

    weight: QuantizedLayer = QuantizedLayer()

    @property
    def as_stored(self) -> Layer:
        return self

    def like(self, module: nn.Module, tensor: str) -> Tensor:
        held = self.read(module, tensor)
        return self.weight.like(module, tensor) if held is None else held


def quantized_layer_of(module: nn.Module, tensor: str, layer: QuantizedLayer) -> Layer | None:
    """Returns the result of the hook `peftcore_layer` for a tensor of a quantized module: a layer for its weight or its
    bias, otherwise None."""
    name = tensor.rpartition(".")[2]
    return (
        replace(layer, called="." not in tensor)
        if name == "weight"
        else QuantizedBias(weight=layer)
        if name == "bias"
        else None
    )


def dense_linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """Returns a frozen linear layer without bias that holds the weight ``[out, in]``."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
    return layer


def floating_dtype(modules: Iterable[nn.Module]) -> torch.dtype:
    """Returns the dtype of a host's first matrix that is not quantized, which is usually an embedding. If all matrices
    are quantized, returns the dtype of another parameter, or float32 without any."""
    own = [p for module in modules for p in module._parameters.values() if p is not None and p.is_floating_point()]
    return min(own, key=lambda p: p.dim() < 2).dtype if own else torch.float32


BIAS = ("_parameters", "bias")
TABLES = ("_parameters", "_buffers")
TENSORS = (*TABLES, "_non_persistent_buffers_set")
"""The attributes in which a module holds its tensors."""
FOREIGN = (*FORWARDS, "_hf_hook")
"""Attributes that other libraries (accelerate) set on an instance; they are kept."""


def replace_in_place(journal: Journal, module: nn.Module, other: nn.Module) -> None:
    """Give `module` the class, parameters, buffers and attributes of `other`, but keep its hooks, grafts, bias and
    training mode.

    Raises:
        MergeError: Python cannot change an object of the one class into an object of the other; nothing was changed.
    """
    _check_becomes(module, plain_class(other))
    bias, new = _bias(module), dict(_own(other))
    journal.afterwards(_stored_anew, module)
    for table in TABLES:
        for key in [key for key in vars(module)[table] if (table, key) != BIAS]:
            journal.drop(module, table, key)
        for key, tensor in reversed(new.pop(table).items()):
            if (table, key) != BIAS:
                journal.put(module, table, key, tensor, order=(key,))
    for key in [key for key, _ in _own(module) if key not in (*TABLES, *new)]:
        journal.drop(module, "", key)
    for key, value in new.items():
        journal.put(module, "", key, copy.copy(value) if key in TENSORS else value)
    journal.put(module, *BIAS, bias)  # where it is there, it is not touched: it may be another one when this is undone
    become(journal, module, plain_class(other))
    for table, hooks in vars(other).items():
        for key, hook in hooks.items() if isinstance(hooks, dict) and table in TORCHS and "hooks" in table else ():
            journal.put(module, table, key, hook)
    _stored_anew(module)


def _check_becomes(module: nn.Module, cls: type[nn.Module]) -> None:
    own = plain_class(module)
    probe = object.__new__(own)
    try:
        object.__setattr__(probe, "__class__", cls)
    except TypeError:
        raise MergeError(
            f"{own.__name__} cannot be converted to {cls.__name__} in place, so its weight was not changed: load the "
            "base without quantization, load the adapter onto it, and merge there"
        ) from None


def _bias(module: nn.Module) -> nn.Parameter | None:
    """Returns the bias; where it is a plain attribute (HQQ), as a parameter."""
    bias: Tensor | None = getattr(module, "bias", None)
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach(), requires_grad=False)


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields a module's own parameters, buffers and attributes, without a forward that other libraries set on it."""
    for key, value in vars(module).items():
        if key in TENSORS or (key not in TORCHS and key not in FOREIGN and not isinstance(value, Slot)):
            yield key, value


def _stored_anew(module: nn.Module) -> None:
    """Update the layers (`Layer`) of a module's operators, after the module got another class."""
    slot = slot_of(module)
    if slot is None:
        return
    for own in slot.mounts.values():
        own[:] = [replace(mount, layer=layer_of(module, mount.tensor)) for mount in own]
        for mount in own:
            mount.operator.layer = mount.layer
    for injection in slot.state.injections.values():
        injection.stored_anew(module)
    slot.changed()
    slot.state.replan()
