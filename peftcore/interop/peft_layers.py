"""Kinds of layers as peft tells them apart: by the class of the module. Most of its types take a few kinds only."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from peftcore.weights import plain_class

KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear", nn.Embedding: "embedding", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d",
}  # fmt: skip
LINEAR, TRANSPOSED = "linear", "transposed linear"
"""``y = W x``, stored as it is; and as transformers' Conv1D does, ``[in, out]``."""


def kind_of(site: Any) -> str:
    """The kind of layer at a site; nothing for what is no whole layer, such as stacked experts or fused rows."""
    utils = sys.modules.get("transformers.pytorch_utils")  # without transformers no module can be one of theirs
    kinds = KINDS if utils is None else {**KINDS, utils.Conv1D: TRANSPOSED}
    if site.tensor != "weight" or site.rows is not None:
        return ""
    cls = plain_class(site.module)
    return next((name for kind, name in kinds.items() if issubclass(cls, kind)), "")


def uneven(module: nn.Module) -> str:
    """What keeps a convolution in two dimensions from being one that peft's rotations are written for: they take one
    number for the kernel, the stride and the padding, and pass over dilation and groups. Nothing for other layers."""
    if not isinstance(module, nn.Conv2d):
        return ""
    pairs = {"kernel": module.kernel_size, "stride": module.stride, "padding": module.padding}
    found = [name for name, value in pairs.items() if isinstance(value, str) or len(set(value)) > 1]
    found += [name for name, value in (("dilation", max(module.dilation)), ("groups", module.groups)) if value > 1]
    found += [] if module.padding_mode == "zeros" else ["padding_mode"]
    return f"convolutions with such a {' and '.join(found)}" if found else ""
