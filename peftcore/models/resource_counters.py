"""Counts the operations and the peak memory within a ``with`` block. It works for real tensors and for torch's fake
tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    # What torch's own counter passes over: products that are added in place, and attention as a CPU does it.
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""Functions that count floating-point operations, by torch operator. They are those of `torch.utils.flop_counter`, and
some more."""


class StorageCounter(TorchDispatchMode):
    """Context manager that measures the tensor storages that are allocated inside it.

    Args:
        before: tensors that were allocated earlier.

    Attributes:
        alive: bytes that are allocated now.
        peak: the largest `alive` after any operation, in bytes.
        flops: floating-point operations of matrix products; a multiply-add counts as two.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = self.flops = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for each in before:
            self._see(each)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._see(each)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.alive -= size

        self._known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)
