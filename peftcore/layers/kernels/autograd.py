"""Conditions under which a kernel's own gradient may replace that of its plain form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def transformed() -> bool:
    """Whether torch.func's grad, vmap and the like are active, which know neither saved-tensor hooks nor addresses."""
    return bool(torch._C._are_functorch_transforms_active())


def saves_elsewhere() -> bool:
    """Whether other saved-tensor hooks are active (a checkpoint, an offload to the CPU), from which hooks of one's own
    would keep tensors. Versions of torch that cannot tell may have some."""
    top = vars(torch._C._autograd).get("_top_saved_tensors_default_hooks")
    return top is None or top(False) is not None


def runs_plain(product: Tensor | None = None) -> bool:
    """Whether plain mathematics is to run in place of a function with a gradient of its own: in code that is compiled,
    transformed by torch.func, or traced.

    Args:
        product: an operand of a kernel that arranges products, which compilers leave as they are written, so that it is
            worth as much in code compiled for a CPU. Exports are plain, for any runtime.
    """
    if torch.compiler.is_compiling():
        return product is None or product.device.type != "cpu" or _exports() or transformed()
    return transformed() or torch._C._get_tracing_state() is not None


_exports: Callable[[], bool] = vars(torch.compiler).get("is_exporting", lambda: True)
"""Whether the compiled code is exported; versions of torch that cannot tell may export it."""


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """Returns the output of a function with a gradient of its own."""
    output: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return output
