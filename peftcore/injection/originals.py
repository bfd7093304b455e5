"""Keeps the original tensors of a merge, and computes fingerprints that show whether a tensor still has the values that
were written.

An original is kept as the tensor itself, as a copy on the CPU, or as a record of ulps. The record has for each value
the number of representable steps between the original and the result of subtracting the delta again. For additive
methods nearly all numbers are zero, so the record compresses to a few percent.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import TensorWeakRef

Keep = Literal["cpu", "record", "device"] | None
Fingerprint = tuple[torch.dtype, torch.Size, int]
LANES = 1021
"""The length of the rows into which a fingerprint divides the values before it sums them. It is a prime, so that
exchanging two rows of a matrix moves their values to other positions."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Returns dtype, shape and a position-dependent sum of a tensor's bits. Fingerprints are equal for equal bits on
    any device and in any layout, and different after any change of one value. A fingerprint costs one pass over the
    memory. Torch's version counters are not used, since many writers do not increase them.
    """
    flat = tensor.detach().reshape(-1)
    if flat.nbytes % 8 or flat.storage_offset() * flat.element_size() % 8:
        flat = F.pad(flat.view(torch.uint8), (0, -flat.nbytes % 8))
    words = flat.view(torch.int64)
    rows, odd = len(words) // LANES, _odd(flat.device)
    rest = words[rows * LANES :]
    total = (rest * odd[: len(rest)]).sum()  # sums wrap round, so nothing is rounded
    if rows:
        total += (words[: rows * LANES].view(rows, LANES).sum(0) * odd).sum()
    return tensor.dtype, tensor.shape, int(total)


@functools.cache
def _odd(device: torch.device) -> Tensor:
    return torch.arange(1, 2 * LANES, 2, device=device)


class Remembered:
    """Holds a weak reference to a tensor. A copy or a pickle of it is empty."""

    def __init__(self, tensor: Tensor | None = None) -> None:
        self._reference = None if tensor is None else TensorWeakRef(tensor)

    def __call__(self) -> Tensor | None:
        """Returns the tensor; None if it does not exist any more."""
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> Any:
        return Remembered, ()


@dataclass(frozen=True, eq=False)
class OriginalTensor:
    """One tensor of the host from before the merge. If other code still holds the tensor object, such as a reference
    model with the same base, unmerging restores that same object, even if only a copy or a record of its values was
    kept.
    """

    aside: Tensor | None = None
    """The tensor itself."""
    values: Tensor | None = None
    """A copy on the CPU."""
    record: bytes | None = None
    digest: bytes = b""
    remembered: Remembered = field(default_factory=Remembered)

    @property
    def tensor(self) -> Tensor | None:
        """The original tensor object, if it still exists."""
        return self.remembered() if self.aside is None else self.aside


def kept(old: Tensor, keep: Keep, predict: Callable[[], Tensor]) -> OriginalTensor:
    """Returns an original tensor in the form that `keep` requests. `predict` is a function that returns the merged
    tensor minus the delta."""
    if keep in (None, "device") or (keep == "cpu" and old.device.type == "cpu"):
        return OriginalTensor(old)  # with None it goes with the merge that succeeded
    if keep == "cpu":
        return OriginalTensor(values=old.detach().to("cpu", copy=True), remembered=Remembered(old))
    steps = _bits(old) - _bits(predict())
    record = zlib.compress(steps.numpy().tobytes(), 6)
    return OriginalTensor(record=record, digest=_digest(old), remembered=Remembered(old))


def brought_back(original: OriginalTensor, now: Tensor, predict: Callable[[], Tensor]) -> Tensor | None:
    """Returns the original tensor, which is to replace the merged tensor `now`. It is the same object as before the
    merge if that object still exists and is on the device of `now`. Returns None if a record does not reproduce the
    original.
    """
    there = original.tensor
    if there is not None and there.device == now.device:
        return there
    values = original.values if there is None else there
    if values is None:
        assert original.record is not None
        steps = torch.frombuffer(bytearray(zlib.decompress(original.record)), dtype=_INTEGERS[now.element_size()])
        bits = _bits(predict())
        values = (bits + steps.view(bits.shape)).view(now.dtype)
        if _digest(values) != original.digest:
            return None
    return stand_in(now, values.to(now.device, copy=True))


def stand_in(like: Tensor, values: Tensor) -> Tensor:
    """Returns a new tensor of the class of `like`, with its requires_grad and its attributes, and these values."""
    values = values.detach()
    new = torch.Tensor._make_subclass(
        type(like), values.contiguous() if like.is_contiguous() else values, like.requires_grad
    )
    vars(new).update(vars(like))
    return new


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.element_size()])


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(_bits(tensor).numpy().tobytes()).digest()
