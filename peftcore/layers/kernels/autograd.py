"""Conditions under which a kernel with a custom gradient may replace its plain form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def transformed() -> bool:
    """Whether transforms of torch.func (such as grad and vmap) are active. These support neither saved-tensor hooks nor
    data pointers."""
    return bool(torch._C._are_functorch_transforms_active())


def saves_elsewhere() -> bool:
    """Whether other saved-tensor hooks are active, such as those of a checkpoint or an offload to the CPU. If a kernel
    set further hooks inside, the outer hooks would not receive the saved tensors. True also if this version of torch
    does not report its hooks."""
    top = vars(torch._C._autograd).get("_top_saved_tensors_default_hooks")
    return top is None or top(False) is not None


def runs_plain(product: Tensor | None = None) -> bool:
    """Whether the plain form must run instead of a function with a custom gradient: in code that is compiled,
    transformed by torch.func, or traced.

    Args:
        product: an operand of a kernel that only rearranges products. Compilers do not rearrange products, so such a
            kernel also runs in code compiled for a CPU. Exported code always has the plain form, so that every runtime
            can run it.
    """
    if torch.compiler.is_compiling():
        return product is None or product.device.type != "cpu" or _exports() or transformed()
    return transformed() or torch._C._get_tracing_state() is not None


_exports: Callable[[], bool] = vars(torch.compiler).get("is_exporting", lambda: True)
"""Whether the compiled code is exported; True if this version of torch does not report it."""


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """Returns the output of an autograd function."""
    output: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return output
