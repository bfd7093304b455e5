"""Classes of layers that peft distinguishes, and layers for which peft computes something else than peftcore."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from peftcore.layers.layer import plain_class


def is_one_of(site: Any, kinds: Iterable[type]) -> bool:
    """True if a site is the whole weight of a layer of one of `kinds`, which are module classes or peftcore's layer
    classes."""
    plain = site.slices is None and not site.batch and site.tensor == "weight"
    return plain and (isinstance(site.module, tuple(kinds)) or type(site.layer) in kinds)


def not_added(site: Any) -> str:
    """Returns the reason why peft and peftcore compute different outputs for a layer; empty if they are equal. Additive
    types of peft add the update's output to the layer's output. peftcore's methods run the layer with the updated
    weight.
    """
    module, forward = site.module, plain_class(site.module).forward
    if isinstance(module, _ConvNd) and module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm"
    utils = sys.modules.get("transformers.pytorch_utils")  # without transformers no module can be one of theirs
    known = [nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, *([utils.Conv1D] if utils else [])]
    if not site.layer.packed and all(forward is not kind.forward for kind in known):
        return "the layer's own forward"
    return ""


def uneven(module: nn.Module) -> str:
    """Returns the reason why peft's rotations do not support a 2D convolution; empty for other layers. peft assumes
    equal kernel sizes, strides and paddings in both dimensions, and no dilation."""
    if not isinstance(module, nn.Conv2d):
        return ""
    pairs = {"kernel": module.kernel_size, "stride": module.stride, "padding": module.padding}
    found = [name for name, value in pairs.items() if isinstance(value, str) or len(set(value)) > 1]
    found += [name for name, value in (("dilation", max(module.dilation)), ("groups", module.groups)) if value > 1]
    return f"such a {' and '.join(found)}" if found else ""
