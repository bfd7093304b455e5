"""Helpers for torch's autocast: they report whether it is enabled, cast operands of products to its dtype, or disable
it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocasts(device: str) -> bool:
    """True if autocast is enabled for a device type; False for "meta", which autocast does not support."""
    return device != "meta" and torch.is_autocast_enabled(device)


def full_precision(like: Tensor) -> AbstractContextManager[None]:
    """Context manager that disables autocast on the device of `like`. It is used for small tensors that are computed
    only from parameters."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def cast_operands(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the operands of a linear layer: x ``[..., in]``, weight ``[out, in]`` and bias ``[out]``, in the dtype of
    autocast if that is enabled, otherwise unchanged."""
    device = x.device.type
    if not autocasts(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
