"""`Layer`, the interface to a module's tensor: how it is stored, and the linear map that the module computes with it.

A method sees every weight in one *logical layout*, ``[*batch, out, in, *kernel]``, whatever the storage: transformers'
Conv1D is transposed, embeddings are tables ``[num, dim]``, experts are three-dimensional. A `Layer` converts between
both layouts, and applies the module's linear map with another weight. It is plain data, and is determined once when a
site is chosen. Implementations of the hook `peftcore_layer` may return a subclass, as quantizers do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.errors import UnsupportedSite
from peftcore.layers.computed_tensors import by_hook
from peftcore.layers.fsdp import is_sharded_class
from peftcore.layers.pieces import outline

Slices = tuple[tuple[int, int], ...]
"""Half-open ranges ``(start, stop)`` of the logical output dimension: the slices of one part of a fused projection."""
SLOT = "_peftcore_slot"
"""The attribute in which an adapted module keeps its slot: its operators and their plans."""
GRAFTED = "_peftcore_base"
"""The attribute of a grafted class (the subclass that an adapted module gets) that stores its base class."""


@dataclass(frozen=True)
class Layer:
    """One tensor of one kind of module. The base class is for tensors stored in logical layout: ``[out, in, *kernel]``
    or vectors."""

    fuses_updates: ClassVar[bool] = False
    """True when the layer has a kernel for `update` that is faster than its plain form."""
    of_vectors: ClassVar[bool] = False
    """True when the module maps each vector in the last dimension of its input independently."""
    batch_dims: int = 0
    """The number of leading dimensions that are neither output nor input: 1 for stacked experts."""
    called: bool = False
    """True when the module computes exactly `apply` plus its bias, so that an adapter may act on activations."""
    one_hot: bool = False
    """True when each input selects a single column of the logical weight (embeddings)."""

    @property
    def packed(self) -> bool:
        """Whether the tensor is stored in another form, such as codes, and each `read` makes a dense copy."""
        return False

    @property
    def runs_dense(self) -> type[nn.Module] | None:
        """The class whose forward runs if an effective tensor replaces the module's tensor; None for the module's own
        class."""
        return None

    @property
    def saves_dense(self) -> bool:
        """Whether the module's own forward saves a dense copy of a quantized weight for backward. If so, peftcore
        recomputes the copy in backward instead."""
        return False

    @property
    def in_pieces(self) -> bool:
        """Whether the module computes with a piece of the tensor (tensor parallelism). Then no operator can act on the
        module's outputs, and operators on the tensor act on the whole tensor, which `read` gathers."""
        return False

    @property
    def one_product(self) -> bool:
        """Whether the module computes only one product with the tensor."""
        return self.called

    @property
    def as_stored(self) -> Layer:
        """The layer of the tensor in its stored layout, for a value that replaces the stored tensor."""
        return Layer()

    @property
    def channel_dim(self) -> int:
        """The dimension of the module's output that the slices index."""
        return -1

    def logical(self, stored: Tensor) -> Tensor:
        """Returns the stored tensor in logical layout; a view where possible."""
        return stored

    def stored(self, logical: Tensor) -> Tensor:
        """Returns a logical tensor in storage layout: the inverse of `logical`."""
        return logical

    def read(self, module: nn.Module, tensor: str) -> Tensor | None:
        """Returns the dense stored tensor at the path `tensor` below `module`, recomputed if a hook of torch computes
        it; None if the module lacks the tensor (a missing bias)."""
        value: Tensor | None = module._parameters.get(tensor)  # as nearly always
        if value is None:
            path, _, name = tensor.rpartition(".")
            owner = module.get_submodule(path)
            way = None if name in owner._parameters else by_hook(owner, name)
            value = getattr(owner, name, None) if way is None else way.value()
        return value if isinstance(value, Tensor) else None

    def held(self, module: nn.Module, tensor: str) -> Tensor | None:
        """Returns the tensor object that the module holds, to find other modules that hold the same object."""
        return self.read(module, tensor)

    def check_readable(self, module: nn.Module, tensor: str) -> None:
        """Verify that `read` supports the format of the tensor. This is cheap, since no values are read.

        Raises:
            UnsupportedSite: `read` does not support the format.
        """

    def check_trains(self, module: nn.Module) -> None:
        """Verify that backward passes gradients through the module.

        Raises:
            UnsupportedHost: it does not, so the module would block the gradients of the modules before it.
        """

    def check_cut(self, module: nn.Module) -> None:
        """Verify that torch can shard the module's tensors over processes (FSDP2).

        Raises:
            UnsupportedHost: a quantizer's format cannot be sharded.
        """

    def check_saves(self, module: nn.Module) -> None:
        """Verify that the module's tensors may be saved as they are.

        Raises:
            ExportError: the tensors would be loaded as tensors of another format of the quantizer.
        """

    def for_forward(self, module: nn.Module, tensor: str, effective: Tensor | None) -> Tensor | None:
        """Returns an effective tensor (in storage layout) in the form that the module's forward needs."""
        return effective

    def has(self, module: nn.Module, tensor: str) -> bool:
        """Whether the module has the tensor. This is cheap even if reading the tensor is expensive."""
        return self.read(module, tensor) is not None

    def slots(self, module: nn.Module) -> tuple[str, ...]:
        """Returns the names of a module's parameters that may be replaced, including parameters that are None (a
        missing bias)."""
        return tuple(module._parameters)

    def like(self, module: nn.Module, tensor: str) -> Tensor:
        """Returns a tensor with the dtype and device of `read`, even if the module lacks the tensor (a missing
        bias)."""
        held = self.read(module, tensor)
        return next(module.parameters()) if held is None else held

    def shape(self, module: nn.Module, tensor: str) -> torch.Size:
        """Returns the logical shape, also of a quantized tensor."""
        stored = self.read(module, tensor)
        assert stored is not None, "only existing tensors have a shape"
        return self.logical(outline(stored)).shape

    def write(self, module: nn.Module, tensor: str, stored: Tensor) -> None:
        """Set the values of a dense stored tensor in place."""
        target = self.read(module, tensor)
        assert target is not None, "only existing tensors are written"
        target.data.copy_(stored)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Returns the module's linear map of `x` with `weight` (logical layout, any number of outputs) and no bias.

        Raises:
            UnsupportedSite: this kind of module does not compute a linear map.
        """
        raise UnsupportedSite("this kind of module does not compute a linear map")

    def apply_dropped(self, x: Tensor, weight: Tensor, probability: float) -> Tensor:
        """Returns `apply` of ``dropout(x)``; with a probability of 0, `apply` of `x`."""
        return self.apply(F.dropout(x, probability) if probability else x, weight)

    def mix(self, low: Tensor, matrix: Tensor) -> Tensor:
        """Returns the matrix ``[out, rank]`` applied to the channels of `low`.

        Raises:
            UnsupportedSite: this kind of module does not compute a linear map.
        """
        raise UnsupportedSite("this kind of module does not compute a linear map")

    def add(self, y: Tensor, low: Tensor, matrix: Tensor, scale: float) -> Tensor:
        """Returns ``y + scale * matrix low``, with the matrix ``[out, rank]`` applied to the channels of `low`.

        Raises:
            UnsupportedSite: this kind of module does not compute a linear map.
        """
        raise UnsupportedSite("this kind of module does not compute a linear map")

    def update(
        self, call: Callable[..., Tensor], x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
    ) -> Tensor:
        """Returns ``call(x) + scale * B A dropout(x)``, with A ``[*batch, rank, in, *kernel]`` and B ``[*batch, out,
        rank]`` of any dtype. `call` is the function that the operator wraps: the module's own forward, or another
        operator."""
        y = call(x)
        A, B = A.to(y.dtype), B.to(y.dtype)
        return self.add(y, self.apply_dropped(x, A, dropout), B, scale)

    def frozen_linear(self, call: Callable[..., Tensor], x: Tensor, width: int) -> tuple[Tensor, Tensor | None] | None:
        """Returns weight ``[out, in]``, in logical layout, and bias ``[out]`` of a frozen linear layer, if `call` is
        the layer's own forward. A fused kernel uses them to compute the layer together with an operator on its inputs
        or outputs, which saves a pass over memory.

        Returns None if such a kernel must not run or is not worth it: `call` is something else, such as another
        operator; weight or bias train, or are not plain tensors (quantized, sharded, traced); the plain mathematics
        runs (`peftcore.author.runs_plain`); or the tensors are small. The caller then runs `call` and adds its update.

        Args:
            call: the function that an operator wraps: the module's own forward, or another operator.
            x: its input, ``[..., in]``.
            width: the number of values per row of `x` for which the kernel saves reading and writing memory: the number
                of outputs for an update, the number of inputs for a rotation.
        """
        return None

    def channels_last(self, activation: Tensor) -> Tensor:
        """Returns an input or output of the module with its channels in the last dimension, ``[..., channels]``; a
        view."""
        return activation.movedim(self.channel_dim, -1)

    def channels_back(self, vectors: Tensor) -> Tensor:
        """Returns vectors ``[..., channels]`` in the layout of the module's output: the inverse of `channels_last`."""
        return vectors.movedim(-1, self.channel_dim)

    def rows(self, activation: Tensor) -> int:
        """Returns the number of rows of the batch in an input or output of the module; 1 if it has no batch
        dimension."""
        return len(activation) if activation.dim() > -self.channel_dim else 1

    def along_channels(self, vector: Tensor, like: Tensor) -> Tensor:
        """Returns `vector` shaped so that it broadcasts over the channels of the activation `like`."""
        return vector


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Returns the original class of a module, without peftcore's grafts, torch's parametrizations and FSDP2: its
    forward reads plain tensors."""
    cls = type(module)
    while GRAFTED in vars(cls) or _is_torchs(cls, module):
        cls = vars(cls).get(GRAFTED) or cls.__bases__[-1]
    return cls


def _is_torchs(cls: type[nn.Module], module: nn.Module) -> bool:
    parametrized = "parametrizations" in module._modules and cls.__name__.startswith("Parametrized")
    return parametrized or is_sharded_class(cls)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor stores plain floating-point numbers. Codes, bytes that need a scale, and subclasses that compute
    their numbers when they are used are not dense.

    DTensors (FSDP2) and fake tensors (while a graph is traced) are dense. Their classes are looked up in `sys.modules`,
    not imported.
    """
    wide = tensor.element_size() > 1 and (tensor.is_floating_point() or tensor.is_complex())
    if not wide or type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return wide
    known = (("torch.distributed.tensor", "DTensor"), ("torch._subclasses.fake_tensor", "FakeTensor"))
    return isinstance(tensor, tuple(vars(sys.modules[module])[name] for module, name in known if module in sys.modules))


def bias_name(tensor: str) -> str:
    """Returns the name of the bias of a weight: ``weight`` -> ``bias``, ``in_proj_weight`` -> ``in_proj_bias``,
    ``gate_up_proj`` -> ``gate_up_proj_bias``."""
    return tensor[: -len("weight")] + "bias" if tensor.endswith("weight") else f"{tensor}_bias"


def overlap(one: Slices | None, other: Slices | None) -> bool:
    """Whether two parts of one tensor overlap; None is the whole tensor."""
    if one is None or other is None:
        return True
    return any(a < d and c < b for a, b in one for c, d in other)


def take(tensor: Tensor, slices: Slices | None, dim: int) -> Tensor:
    """Returns the slices of one part; the tensor itself when `slices` is None."""
    if slices is None:
        return tensor
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def put(tensor: Tensor, part: Tensor, slices: Slices | None, dim: int) -> Tensor:
    """Returns `tensor` with the slices of one part replaced (a new tensor)."""
    if slices is None:
        return part
    pieces, end, used = [], 0, 0
    for start, stop in slices:
        pieces += [tensor.narrow(dim, end, start - end), part.narrow(dim, used, stop - start)]
        end, used = stop, used + stop - start
    pieces.append(tensor.narrow(dim, end, tensor.shape[dim] - end))
    return torch.cat([piece for piece in pieces if piece.shape[dim]], dim)
