"""Parameters that are partitioned: each process holds one piece.

There are two kinds. A distributed tensor of torch (FSDP2, tensor parallelism) has the shape of the whole tensor. A
parameter of DeepSpeed's ZeRO-3 is empty, of shape ``[0]``, except while DeepSpeed gathers it: in the forward and
backward that use it, and on demand. This module looks up the classes and functions of both without importing them: if
they are not imported, no tensor is in pieces.

All processes must call the functions that make a tensor whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import ExportError

ALONE: ContextVar[bool] = ContextVar("ALONE", default=False)
"""Whether this process now works without the other processes, so that it cannot gather tensors."""
ZERO = "deepspeed.runtime.zero"
ENGINE = (
    "DeepSpeed's ZeRO-3 has partitioned the parameters, and its optimizer has separate copies of their values, which "
    "peftcore does not change"
)
"""The text of the error if values of parameters under ZeRO-3 would have to change."""


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor is a distributed tensor: this process holds a piece of it, and other processes the rest."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed (ZeRO-3) has partitioned a parameter; True also while it is gathered."""
    zero = sys.modules.get(f"{ZERO}.partition_parameters")
    return zero is not None and bool(zero.is_zero_param(tensor))


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole tensor. For a distributed tensor, gradients flow back into the pieces; for a parameter of
    ZeRO-3, the result is a copy of the values, unless the parameter is gathered already.

    Raises:
        ExportError: this process now works without the other processes.
    """
    if ALONE.get() and (is_cut(tensor) or is_empty(tensor)):
        raise ExportError(
            "the file needs whole weights, but this process has only a piece of them: call save(folder) in all "
            "processes"
        )
    if is_cut(tensor):
        return tensor.full_tensor()  # type: ignore[attr-defined,no-any-return]
    if not is_empty(tensor):
        return tensor
    with at_hand([tensor]):
        return tensor.detach().clone()


def outline(tensor: Tensor) -> Tensor:
    """Returns a tensor with the shape of the whole tensor, for callers that only need the shape; it may be on the meta
    device."""
    if not is_empty(tensor):
        return tensor
    return torch.empty(_zeros(tensor).ds_shape, dtype=tensor.dtype, device="meta")


def cut_like(value: Tensor, piece: Any) -> Tensor:
    """Returns `value` as a distributed tensor that is sharded like `piece`. Every process must pass the same whole
    value."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, piece.device_mesh, piece.placements, src_data_rank=None)


@contextmanager
def at_hand(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Context manager in which parameters of ZeRO-3 have their values, for reading. Writes are lost, or DeepSpeed
    raises an error. Parameters that are gathered already stay gathered."""
    zero = sys.modules.get(f"{ZERO}.partition_parameters")
    empty = [] if zero is None else [each for each in parameters if is_empty(each)]
    with zero.GatheredParameters(empty) if zero is not None and empty else nullcontext():
        yield


def is_in_engine(model: nn.Module) -> bool:
    """Whether DeepSpeed's engine (ZeRO-3) manages the module: parameters that are added now do not train."""
    zero = sys.modules.get(f"{ZERO}.parameter_offload")
    return zero is not None and isinstance(model._parameters, zero.ZeROOrderedDict)


def is_empty(tensor: Tensor) -> bool:
    """Whether a parameter of ZeRO-3 is without values now, because it is not gathered."""
    return tensor.shape == (0,) and is_partitioned(tensor) and _zeros(tensor).ds_shape != tensor.shape


def _zeros(tensor: Any) -> Any:
    """Returns the parameter itself, typed as `Any`: a parameter of ZeRO-3 has attributes that torch's parameters do not
    have."""
    return tensor
