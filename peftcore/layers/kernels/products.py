"""Products with a layer's own weight, which a function that has the layer in it makes itself."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 2**23
"""Multiplications of a product from which on it counts by which library it is made."""
SOME = 8
"""Rows of which that is so, too; of one or two MKL takes less time."""
DENSE = (Tensor, nn.Parameter)
"""The classes of plain tensors."""


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight rows + bias`` for rows ``[n, in]`` and a weight ``[out, in]`` that may lie either way.

    Torch makes it by MKL, and has oneDNN as well, which takes nine tenths of the time on AMD's processors. There it is
    made by that in float32, where nobody differentiates it or watches what torch does (who counts operations, say).
    `torch.backends.mkldnn.enabled = False` leaves all to torch.
    """
    few = rows.shape[0] < SOME or rows.numel() * weight.shape[0] < MANY
    if few or _ONEDNN is None or not _by_onednn(rows, weight):
        return F.linear(rows, weight, bias)
    return _ONEDNN(rows, weight, bias, "none", [], "")


def _by_onednn(rows: Tensor, weight: Tensor) -> bool:
    return (
        SUITS
        and type(rows) in DENSE
        and type(weight) in DENSE
        and rows.is_contiguous()
        and (weight.is_contiguous() or weight.mT.is_contiguous())  # else a thousand times as slow
        and rows.dtype is weight.dtype is torch.float32
        and rows.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_mkldnn_enabled()
    )


def _on_amd() -> bool:
    """Whether this is one of AMD's processors: Linux says it in a file, Windows to who asks for the processor."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        described = platform.processor()
    return "AuthenticAMD" in described


def _found() -> Callable[..., Tensor] | None:
    """The operator by which torch's own compiler makes linear layers; builds without oneDNN have none."""
    try:
        operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None
    return operator


_ONEDNN = _found()
SUITS = torch._C.has_mkl and _on_amd()
"""Whether oneDNN, if it is there, is faster than what torch takes here."""
